// SPLA decode of one layer in one launch: a thread block cluster a (row, kv head).
//
// The launches of `triton_decode` wait for each other through device memory, and at small batches that is all they do.
// Here a cluster of up to 16 thread blocks scores its pages, agrees on a selection, attends and merges through
// distributed shared memory. `fused_decode.py` compiles (NVRTC) and launches it, and says what it covers; the plain
// reference is `reference.spla_token`, the plain peer on a GPU `TritonPagedSpla`.
//
// Steps of a thread block (docs/design.md, 1 to 6, for what is computed):
//   1. eight warps score their units (selection blocks) of the cluster's share; a ninth checks the recurrent state and
//      reads its share of phi(q) S; where pages are to be folded, all warps fold first
//   2. normalisers of all heads are exchanged, group scores computed and sent to all blocks of the cluster
//   3. every block finds the same threshold and the same list; each attends to its share of the list's tokens
//   4. partial results are merged over warps, then over the cluster, a slice of the output a block
//
// Statistics, keys and values come through the bulk copy engine into a ring a warp owns: no warp waits for another.
// What is read is a dense row of `2 D` elements in all cases: mean and variance of a unit, key and value of a token.
//
// Floor, bytes a (row, kv head): `2 D` elements a unit and 4 bytes a page; `2 D` elements a selected token;
// `(D + 2) D` float32 of state. FLOP: `4 GROUP D` a unit, `8 GROUP D` a selected token, on the CUDA cores: for at most
// 8 heads that is below what memory takes.
//
// Compiled with: D, GROUP, PAGE, UNIT (tokens a selection block), FP16 (0: bf16), SELECTOR, RESIDUAL (0 none,
// 1 regression), NUM_BLOCKS, BODY (state blocks a request, body rows a block), STAMP_WORD, MAGIC, LOG_UNIT (log of UNIT).

namespace spla {

typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;

#define TAYLOR2 1
#define CUMULANT2 2
#define REM 3
#define QUEST 4

constexpr int next_power(int x) { return x <= 1 ? 1 : 2 * next_power((x + 1) / 2); }

constexpr int GP = next_power(GROUP);      // heads of a group, padded
constexpr int WARPS = 8;                   // that score and attend
constexpr int THREADS = WARPS * 32;        // of these; one warp more has the state
constexpr int ROW = 2 * D;                 // elements of a row
constexpr int ROW_BYTES = 2 * ROW;
constexpr int UNITS_PER_PAGE = PAGE / UNIT;
constexpr int STAGE_ROWS = 2048 / ROW_BYTES;          // units a scoring stage
constexpr int STAGES = 4;
constexpr int TOKENS = 8;                             // a step of attention
constexpr int STEP_BYTES = TOKENS * ROW_BYTES;
constexpr int RING_BYTES = GP <= 4 ? 8192 : 16384;    // a warp; later its partial result, [PART_ROWS][D] float
constexpr int STEPS = RING_BYTES / STEP_BYTES;        // of attention in the ring
constexpr int CHUNKS = D / 8;                         // lanes a key: 8 elements each
constexpr int KEYS_AT_ONCE = 32 / CHUNKS;             // keys a warp reads with one instruction
constexpr int LANE_KEYS = TOKENS / KEYS_AT_ONCE;
constexpr int VALUE_LANES = D / 4;                    // lanes a value: 4 elements each
constexpr int VALUES_AT_ONCE = 32 / VALUE_LANES;
constexpr int PART_ROWS = 2 * GP + 1;                 // exact, residual of each head; sum of values
constexpr int SCALARS = 5;                            // a head: maximum, sum, phi(q) . z, maximum and sum of the mass
constexpr int MAX_CLUSTER = 16;
constexpr float LOG2E = 1.4426950408889634f;
constexpr float LN2 = 0.6931471805599453f;
constexpr int LOWEST = -2147483647 - 1;
constexpr int HIGHEST = 2147483647;

struct Params {
    const u16 *query;        // [tokens, H, D], unscaled
    const u16 *kv;           // [pages, G, PAGE + r, 2 D]
    float *state;            // state blocks, as float32
    u16 *output;             // [tokens, H, D]
    const float *gain;       // [H]
    const int *query_start_loc;  // [rows + 1]
    const int *seq_lens;     // [rows]
    const int *block_table;  // [rows, pages]
    const int *state_table;  // [rows, NUM_BLOCKS]
    int *table;              // [tokens, G, table_width]: ids of the selected units, ascending, the current one last
    int *count;              // [tokens, G]
    i64 query_token_stride, query_head_stride;
    i64 page_stride, head_stride;              // elements
    i64 state_block_stride, state_head_stride; // float32
    i64 output_token_stride, output_head_stride;
    i64 block_table_stride, state_table_stride;
    int num_rows, num_kv_heads, last_page, max_units, table_width;
    int budget, first, last;  // units
    int dense_units;          // rows of at most so many units attend to all of them
    float scale, residual_scale;
};

#ifndef SPLA_EMULATE  // ------------------------------------------------------------- the hardware, in one place each

#define DEVICE static __device__ __forceinline__
extern __shared__ __align__(128) char shared_memory[];

DEVICE int thread_id() { return threadIdx.x; }
DEVICE int block_x() { return blockIdx.x; }
DEVICE int block_y() { return blockIdx.y; }
DEVICE int block_z() { return blockIdx.z; }
DEVICE int cluster_size() { return gridDim.x; }
DEVICE u32 shared_address(const void *p) { return (u32)__cvta_generic_to_shared(p); }
DEVICE float shuffle_xor(float x, int mask) { return __shfl_xor_sync(0xffffffffu, x, mask); }
DEVICE float shuffle(float x, int lane) { return __shfl_sync(0xffffffffu, x, lane); }
DEVICE u32 ballot(bool x) { return __ballot_sync(0xffffffffu, x); }
DEVICE u32 warp_sum(u32 x) { return __reduce_add_sync(0xffffffffu, x); }
DEVICE int warp_min(int x) { return __reduce_min_sync(0xffffffffu, x); }
DEVICE int warp_max(int x) { return __reduce_max_sync(0xffffffffu, x); }
DEVICE int popcount(u32 x) { return __popc(x); }
DEVICE void sync_warp() { __syncwarp(); }
DEVICE void sync_block() { __syncthreads(); }
DEVICE void sync_workers() { asm volatile("bar.sync 1, %0;" ::"n"(THREADS) : "memory"); }
DEVICE void sync_cluster() {
    asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}
// The same place in the shared memory of another block of the cluster.
template <typename T> DEVICE T *of_block(T *p, int rank) {
    u64 out;
    asm("mapa.u64 %0, %1, %2;" : "=l"(out) : "l"((u64)p), "r"(rank));
    return (T *)out;
}
DEVICE void grid_wait() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
DEVICE void grid_launch() { asm volatile("griddepcontrol.launch_dependents;"); }
DEVICE float exp2_(float x) { float y; asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x)); return y; }
DEVICE float log2_(float x) { float y; asm("lg2.approx.f32 %0, %1;" : "=f"(y) : "f"(x)); return y; }
DEVICE float sqrt_(float x) { float y; asm("sqrt.approx.f32 %0, %1;" : "=f"(y) : "f"(x)); return y; }
DEVICE int as_int(float x) { return __float_as_int(x); }
DEVICE float as_float(u32 x) { return __uint_as_float(x); }
DEVICE float infinity() { return __int_as_float(0x7f800000); }
DEVICE float half_to_float(u16 x) { float y; asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x)); return y; }
DEVICE u16 float_to_half(float x) { u16 y; asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y) : "f"(x)); return y; }
DEVICE u16 float_to_bf16(float x) { u16 y; asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y) : "f"(x)); return y; }

typedef u64 Barrier;
DEVICE void barrier_init(Barrier *b) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_address(b)) : "memory");
}
DEVICE void barriers_visible() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
// What was written to shared memory by ordinary stores stands before what the copy engine writes next.
DEVICE void before_copies() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
DEVICE void expect(Barrier *b, u32 bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(b)), "r"(bytes) : "memory");
}
DEVICE void copy_in(void *to, const void *from, u32 bytes, Barrier *b) {
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
            shared_address(to)), "l"((u64)from), "r"(bytes), "r"(shared_address(b)) : "memory");
}
DEVICE void wait(Barrier *b, u32 parity) {
    asm volatile(
        "{\n.reg .pred done;\nagain:\nmbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n@!done bra again;\n}" ::"r"(
            shared_address(b)), "r"(parity) : "memory");
}
#if GROUP <= 4
#define KERNEL extern "C" __global__ void __launch_bounds__(THREADS + 32, 2)
#else
#define KERNEL extern "C" __global__ void __launch_bounds__(THREADS + 32, 1)
#endif
#define KERNEL_PARAMS const __grid_constant__ Params p
#endif  // ---------------------------------------------------------------------------------------------------------

struct alignas(16) Four { float x[4]; };
struct alignas(16) Words { u32 x[4]; };
struct alignas(8) Pair { u32 x[2]; };

DEVICE float low(u32 two) {
#if FP16
    return half_to_float((u16)two);
#else
    return as_float(two << 16);
#endif
}
DEVICE float high(u32 two) {
#if FP16
    return half_to_float((u16)(two >> 16));
#else
    return as_float(two & 0xffff0000u);
#endif
}
DEVICE float element(u16 x) { return low(x); }
DEVICE u16 rounded(float x) {
#if FP16
    return float_to_half(x);
#else
    return float_to_bf16(x);
#endif
}
DEVICE float exp_(float x) { return exp2_(x * LOG2E); }
DEVICE float log_(float x) { return log2_(x) * LN2; }
DEVICE int min_(int a, int b) { return a < b ? a : b; }
DEVICE int max_(int a, int b) { return a > b ? a : b; }
DEVICE float max_(float a, float b) { return a > b ? a : b; }
DEVICE int ceil_div(int a, int b) { return (a + b - 1) / b; }
DEVICE float finite_or_0(float x) { return x == -infinity() ? 0.0f : x; }

// Int that compares as the float does.
DEVICE int ordered(float x) {
    int bits = as_int(x);
    return bits < 0 ? bits ^ 0x7fffffff : bits;
}

// Sums over LANES neighbouring lanes of N values each. Afterwards lane `l` has the sums of the values
// `(l % LANES) * N / LANES ..`, `N / LANES` of them (at least 1), in `v[0 ..]`: half as many shuffles as values.
template <int N, int LANES> struct Reduce {
    template <int M> DEVICE void run(float (&v)[M], int lane) {
        constexpr int OTHER = LANES / 2;
        if constexpr (LANES > 1) {
            if constexpr (N > 1) {
                bool upper = lane & OTHER;
#pragma unroll
                for (int i = 0; i < N / 2; i++) {
                    float sent = upper ? v[i] : v[i + N / 2];
                    float kept = upper ? v[i + N / 2] : v[i];
                    v[i] = kept + shuffle_xor(sent, OTHER);
                }
                Reduce<N / 2, LANES / 2>::run(v, lane);
            } else {
                v[0] += shuffle_xor(v[0], OTHER);
                Reduce<1, LANES / 2>::run(v, lane);
            }
        }
    }
};

// What the variance `s2` of q . k adds to a score (SPLA, COBS, random energy model).
DEVICE float second_order(float s2) {
#if SELECTOR == TAYLOR2
    return log_(1.0f + 0.5f * s2);
#elif SELECTOR == CUMULANT2
    return 0.5f * s2;
#else
    return s2 < 2.0f * LOG_UNIT ? 0.5f * s2 : sqrt_(2.0f * LOG_UNIT * s2) - LOG_UNIT;
#endif
}

// Shared memory of a block.
struct Shared {
    char *ring;       // [WARPS][RING_BYTES]
    int *keys;        // [max_units]: group scores of all units, as ordered ints
    float *score;     // [share][GP]: of this block's units
    float *mass;      // [share][GP], where there is a residual
    int *list;        // [budget]: selected units, where some are left out
    float *query;     // [GP][D], scaled
    float *weights;   // [WARPS][TOKENS][2 GP]: softmax and feature weights of a warp's tokens
    float *part;      // [PART_ROWS][D]: this block's partial result
    float *read;      // [GP + 1][D]: phi(q) S over this block's rows of the state; its share of sum v
    float *norms;     // [MAX_CLUSTER][2 GP]: maxima and sums of the blocks' scores
    float *scalars;   // [MAX_CLUSTER][SCALARS GP]: of all blocks
    float *mine;      // [SCALARS GP]
    float *warp;      // [WARPS][4 GP]
    float *final_;    // [(MAX_CLUSTER + 4) GP]
    int *count;       // [2][WARPS][4]
    int *flags;       // [4]
    Barrier *barriers;  // [WARPS][STAGES + STEPS]
};

DEVICE int share_of(int units, int blocks) { return (ceil_div(units, blocks) + 3) / 4 * 4; }

// `kernels/fused_decode.py: shared_bytes` adds up the same.
DEVICE Shared carve(char *base, const Params &p, int blocks) {
    Shared s;
    char *at = base;
    int share = share_of(p.max_units, blocks);
#define TAKE(field, type, n) s.field = (type *)at; at += ((n) * sizeof(type) + 15) / 16 * 16;
    TAKE(ring, char, WARPS * RING_BYTES)
    // No warp scores any more when keys are written, nor has a token been asked for before they are read.
    s.keys = (int *)s.ring;
    if (p.max_units * 4 > WARPS * RING_BYTES) {
        TAKE(keys, int, (p.max_units + 3) / 4 * 4)
    }
    TAKE(score, float, share * GP)
    TAKE(mass, float, RESIDUAL ? share * GP : 0)
    TAKE(list, int, p.budget)
    TAKE(query, float, GP * D)
    TAKE(weights, float, WARPS * TOKENS * 2 * GP)
    TAKE(part, float, PART_ROWS * D)
    TAKE(read, float, (GP + 1) * D)
    TAKE(norms, float, MAX_CLUSTER * 2 * GP)
    TAKE(scalars, float, MAX_CLUSTER * SCALARS * GP)
    TAKE(mine, float, SCALARS * GP)
    TAKE(warp, float, WARPS * 4 * GP)
    TAKE(final_, float, (MAX_CLUSTER + 4) * GP)
    TAKE(count, int, 2 * WARPS * 4)
    TAKE(flags, int, 4)
    TAKE(barriers, Barrier, WARPS * (STAGES + STEPS))
#undef TAKE
    return s;
}

struct Row {
    const int *pages;       // block table
    const int *blocks;      // state blocks
    const u16 *kv;          // pages of this kv head
    float *state;           // state blocks of this kv head
    int position;           // of the query token
    int num_units;          // of complete pages
    int num_current;        // units of the current page, the last one partly filled
    int head;
    i64 page_stride, state_block_stride;
    int last_page;
};

// Page ids come from the engine; one that no page has must not lead out of the cache.
DEVICE const u16 *page_at(const Row &row, int id) {
    return row.kv + (i64)min_(max_(id, 0), row.last_page) * row.page_stride;
}

DEVICE float *state_row(const Row &row, int t) {
    i64 block = max_(row.blocks[t / BODY], 0);
    return row.state + block * row.state_block_stride + (1 + t % BODY) * D;
}

// ------------------------------------------------------------------------------------------------ recurrent state

// Pages that the stored state covers for this very sequence, 0 where it cannot be trusted; one warp.
DEVICE int trusted_pages(const Row &row, int target, int lane) {
    const int *header = (const int *)(row.state + (i64)max_(row.blocks[0], 0) * row.state_block_stride);
    int covered = header[1];
    bool right = covered > 0 && covered <= target;
    if (right) {
        int word = lane & 7;
        int stamp = 0;
        if (word >= 2 && word < 6) stamp = ((const int *)page_at(row, row.pages[covered - 1]))[STAMP_WORD + word - 2];
        for (int b = 0; b < NUM_BLOCKS; b++) {
            const int *mine = (const int *)(row.state + (i64)max_(row.blocks[b], 0) * row.state_block_stride);
            int expected = word == 0 ? MAGIC : word == 1 ? covered : word == 6 ? b : stamp;
            right = right && mine[word] == expected;
        }
    }
    return ballot(!right) == 0 ? covered : 0;
}

// Say that the stored state covers `target` pages; one warp, when every block has read the headers.
DEVICE void write_headers(const Row &row, int target, int lane) {
    if (lane < 8) {
        int stamp = 0;
        if (lane >= 2 && lane < 6) stamp = ((const int *)page_at(row, row.pages[target - 1]))[STAMP_WORD + lane - 2];
        for (int b = 0; b < NUM_BLOCKS; b++) {
            int *header = (int *)(row.state + (i64)max_(row.blocks[b], 0) * row.state_block_stride);
            header[lane] = lane == 0 ? MAGIC : lane == 1 ? target : lane == 6 ? b : stamp;
        }
    }
}

// Fold the pages `covered .. target - 1` into this block's rows of the state. All eight warps: a warp has some rows, or,
// where a block has few rows, some of the tokens of each page, and the sums meet in the ring.
DEVICE void fold(const Shared &s, const Row &row, int rank, int blocks, int covered, int target, int warp, int lane) {
    constexpr int MOST = 8;  // rows at a time
    int num_rows = D / blocks;
    int first_row = rank * num_rows;
    int chunk = min_(MOST, num_rows);
    int num_chunks = num_rows / chunk;
    int sharing = max_(1, WARPS / num_chunks);  // warps a chunk
    int part = warp % sharing;
    int column = lane % VALUE_LANES * 4;
    int sub = lane / VALUE_LANES;
    for (int first_chunk = 0; first_chunk < num_chunks; first_chunk += WARPS / sharing) {
        int c = first_chunk + warp / sharing;
        int base = first_row + c * chunk;
        float sum[MOST][4] = {}, z[MOST] = {}, v_sum[4] = {};
        for (int index = covered; index < target; index++) {
            const u16 *page = page_at(row, row.pages[index]);
#pragma unroll 2
            for (int t = part * VALUES_AT_ONCE + sub; t < PAGE; t += sharing * VALUES_AT_ONCE) {
                const u16 *token = page + t * ROW;
                Pair two = *(const Pair *)(token + D + column);
                float v[4] = {low(two.x[0]), high(two.x[0]), low(two.x[1]), high(two.x[1])};
#pragma unroll
                for (int j = 0; j < 4; j++) v_sum[j] += v[j];
#pragma unroll
                for (int i = 0; i < MOST; i++) {
                    float k = i < chunk ? element(token[base + i]) : 0.0f;
                    z[i] += k;
#pragma unroll
                    for (int j = 0; j < 4; j++) sum[i][j] += k * v[j];
                }
            }
        }
        float *ring = (float *)(s.ring + warp * RING_BYTES);  // [MOST + 1][D], then z [MOST]
        if constexpr (VALUES_AT_ONCE > 1) {
#pragma unroll
            for (int j = 0; j < 4; j++) v_sum[j] += shuffle_xor(v_sum[j], VALUE_LANES);
#pragma unroll
            for (int i = 0; i < MOST; i++) {
                z[i] += shuffle_xor(z[i], VALUE_LANES);
#pragma unroll
                for (int j = 0; j < 4; j++) sum[i][j] += shuffle_xor(sum[i][j], VALUE_LANES);
            }
        }
        if (sub == 0) {
#pragma unroll
            for (int i = 0; i < MOST; i++)
                *(Four *)(ring + i * D + column) = {{sum[i][0], sum[i][1], sum[i][2], sum[i][3]}};
            *(Four *)(ring + MOST * D + column) = {{v_sum[0], v_sum[1], v_sum[2], v_sum[3]}};
        }
        if (lane == 0)
#pragma unroll
            for (int i = 0; i < MOST; i++) ring[(MOST + 1) * D + i] = z[i];
        sync_workers();
        if (part == 0) {
            for (int e = lane; e < (chunk + 1) * D + chunk; e += 32) {
                // Sums of v belong to the first rows of the first block.
                int at = e < chunk * D ? e : e < (chunk + 1) * D ? MOST * D + e - chunk * D : (MOST + 1) * D + e - (chunk + 1) * D;
                float more = 0.0f;
                for (int w = 0; w < sharing; w++) more += ((float *)(s.ring + (warp + w) * RING_BYTES))[at];
                float *to;
                if (e < chunk * D) {
                    to = state_row(row, base + e / D) + e % D;
                } else if (e < (chunk + 1) * D) {
                    if (base != 0) continue;
                    to = state_row(row, D) + e - chunk * D;
                } else {
                    to = state_row(row, D + 1) + base + e - (chunk + 1) * D;
                }
                // Old bytes that are not trusted may be NaN.
                *to = (covered > 0 ? *to : 0.0f) + more;
            }
        }
        sync_workers();
    }
}

// phi(q) S, phi(q) . z and sum v over this block's rows; one warp.
DEVICE void read_state(const Shared &s, const Row &row, int rank, int blocks, int lane) {
    int num_rows = D / blocks;
    int first_row = rank * num_rows;
    int column = lane % VALUE_LANES * 4;
    int sub = lane / VALUE_LANES;
    float sum[GP][4] = {};
#pragma unroll 4
    for (int i = sub; i < num_rows; i += VALUES_AT_ONCE) {
        Four x = *(const Four *)(state_row(row, first_row + i) + column);
#pragma unroll
        for (int h = 0; h < GP; h++) {
            float q = s.query[h * D + first_row + i];
#pragma unroll
            for (int j = 0; j < 4; j++) sum[h][j] += q * x.x[j];
        }
    }
    float z[GP] = {};
    for (int i = lane; i < num_rows; i += 32) {
        float x = state_row(row, D + 1)[first_row + i];
#pragma unroll
        for (int h = 0; h < GP; h++) z[h] += s.query[h * D + first_row + i] * x;
    }
    if constexpr (VALUES_AT_ONCE > 1) {
#pragma unroll
        for (int h = 0; h < GP; h++)
#pragma unroll
            for (int j = 0; j < 4; j++) sum[h][j] += shuffle_xor(sum[h][j], VALUE_LANES);
    }
#pragma unroll
    for (int h = 0; h < GP; h++)
        for (int other = 16; other > 0; other /= 2) z[h] += shuffle_xor(z[h], other);
    if (sub == 0) {
#pragma unroll
        for (int h = 0; h < GP; h++) *(Four *)(s.read + h * D + column) = {{sum[h][0], sum[h][1], sum[h][2], sum[h][3]}};
        Four v = {{0, 0, 0, 0}};
        if (rank == 0) v = *(const Four *)(state_row(row, D) + column);
        *(Four *)(s.read + GP * D + column) = v;
    }
    if (lane == 0)
#pragma unroll
        for (int h = 0; h < GP; h++) s.mine[2 * GP + h] = z[h];
}

// ------------------------------------------------------------------------------------------------------- scoring

// Scores, and masses where there is a residual, of the units `first .. first + num - 1`; one warp's share of them.
DEVICE void score_units(const Shared &s, const Row &row, int first, int num, int warp, int lane) {
    constexpr int HALF = CHUNKS;              // lanes of a mean, and then of a variance
    constexpr int AT_ONCE = 32 / (2 * HALF);  // units a warp reads with one instruction
    constexpr int LANE_UNITS = STAGE_ROWS / AT_ONCE;
    constexpr int N = LANE_UNITS * GP;
    constexpr int SUMS = N > HALF ? N / HALF : 1;
    char *ring = s.ring + warp * RING_BYTES;
    Barrier *full = s.barriers + warp * (STAGES + STEPS);
    int num_groups = ceil_div(num, STAGE_ROWS);
    int mine = num_groups > warp ? ceil_div(num_groups - warp, WARPS) : 0;

    auto page_id = [&](int k, int r) {  // behind the last unit, the last again
        int unit = first + min_((warp + k * WARPS) * STAGE_ROWS + r, num - 1);
        return row.pages[unit / UNITS_PER_PAGE];
    };
    auto issue = [&](int k, int r, int id, int stage) {
        int unit = first + min_((warp + k * WARPS) * STAGE_ROWS + r, num - 1);
        const u16 *from = page_at(row, id) + PAGE * ROW + unit % UNITS_PER_PAGE * ROW;
        copy_in(ring + stage * 2048 + r * ROW_BYTES, from, ROW_BYTES, full + stage);
    };
    // All stages at once: a lane a unit.
    for (int i = lane; i < STAGES * STAGE_ROWS; i += 32) {
        int k = i / STAGE_ROWS, r = i % STAGE_ROWS;
        if (k < mine) {
            if (r == 0) expect(full + k, STAGE_ROWS * ROW_BYTES);
            issue(k, r, page_id(k, r), k);
        }
    }
    int next_id = lane < STAGE_ROWS && STAGES < mine ? page_id(STAGES, lane) : 0;

    bool second = lane & HALF;
    float w[GP][8];  // the first half of a unit's lanes has q, the second q^2
#pragma unroll
    for (int h = 0; h < GP; h++)
#pragma unroll
        for (int j = 0; j < 8; j++) {
            float q = s.query[h * D + lane % HALF * 8 + j];
#if SELECTOR == QUEST
            w[h][j] = second ? max_(q, 0.0f) : -max_(-q, 0.0f);
#else
            w[h][j] = second ? q * q : q;
#endif
        }
    for (int k = 0; k < mine; k++) {
        int stage = k % STAGES;
        wait(full + stage, k / STAGES & 1);
        float v[N];
#pragma unroll
        for (int i = 0; i < LANE_UNITS; i++) {
            Words x = *(const Words *)(ring + stage * 2048 + i * 512 + lane * 16);
#pragma unroll
            for (int h = 0; h < GP; h++) {
                float sum = 0.0f;
#pragma unroll
                for (int j = 0; j < 4; j++) sum += low(x.x[j]) * w[h][2 * j] + high(x.x[j]) * w[h][2 * j + 1];
                v[i * GP + h] = sum;
            }
        }
        sync_warp();  // all lanes have read the stage
        if (k + STAGES < mine) {
            if (lane == 0) expect(full + stage, STAGE_ROWS * ROW_BYTES);
            if (lane < STAGE_ROWS) {
                issue(k + STAGES, lane, next_id, stage);
                if (k + STAGES + 1 < mine) next_id = page_id(k + STAGES + 1, lane);
            }
        }
        Reduce<N, HALF>::run(v, lane);
#pragma unroll
        for (int i = 0; i < SUMS; i++) {
            float other = shuffle_xor(v[i], HALF);
            int index = lane % HALF * N / HALF + i;
            int unit = (warp + k * WARPS) * STAGE_ROWS + index / GP * AT_ONCE + lane / (2 * HALF);
            if (!second && unit < num) {
#if SELECTOR == QUEST
                s.score[unit * GP + index % GP] = v[i] + other;
#else
                float s2 = max_(other, 0.0f);
                s.score[unit * GP + index % GP] = LOG_UNIT + v[i] + second_order(s2);
#if RESIDUAL
                s.mass[unit * GP + index % GP] = LOG_UNIT + v[i] + log_(1.0f + 0.5f * s2);
#endif
#endif
            }
        }
    }
}

// Maximum, and sum of exponentials from it, for each head over `x [num][GP]`; all eight warps. In thread `h < GP`.
DEVICE void norm_of(const Shared &s, const float *x, int num, int tid, float &top, float &sum) {
    int lane = tid % 32, warp = tid / 32;
    top = -infinity();
    for (int i = tid; i < num * GP; i += THREADS) top = max_(top, x[i]);
#pragma unroll
    for (int other = GP; other < 32; other *= 2) top = max_(top, shuffle_xor(top, other));
    if (lane < GP) s.warp[warp * 4 * GP + lane] = top;
    sync_workers();
    top = -infinity();
    for (int w = 0; w < WARPS; w++) top = max_(top, s.warp[w * 4 * GP + lane % GP]);
    float anchor = finite_or_0(top);
    sum = 0.0f;
    for (int i = tid; i < num * GP; i += THREADS) sum += exp_(x[i] - anchor);
#pragma unroll
    for (int other = GP; other < 32; other *= 2) sum += shuffle_xor(sum, other);
    if (lane < GP) s.warp[warp * 4 * GP + GP + lane] = sum;
    sync_workers();
    if (tid < GP) {
        sum = 0.0f;
        for (int w = 0; w < WARPS; w++) sum += s.warp[w * 4 * GP + GP + tid];
    }
}

// Group scores of this block's units, as ordered ints, to all blocks of the cluster.
DEVICE void share_scores(const Shared &s, const Row &row, const Params &p, int first, int num, int blocks, int tid) {
    int lane = tid % 32;
    // Normalisers over the blocks: a lane has head `lane % GP` of every so many-th block.
    float top = -infinity();
    for (int b = lane / GP; b < blocks; b += 32 / GP) top = max_(top, s.norms[b * 2 * GP + lane % GP]);
#pragma unroll
    for (int other = GP; other < 32; other *= 2) top = max_(top, shuffle_xor(top, other));
    float sum = 0.0f;
    for (int b = lane / GP; b < blocks; b += 32 / GP) {
        float at = s.norms[b * 2 * GP + lane % GP];
        if (at != -infinity()) sum += s.norms[b * 2 * GP + GP + lane % GP] * exp_(at - top);
    }
#pragma unroll
    for (int other = GP; other < 32; other *= 2) sum += shuffle_xor(sum, other);
    float mine = top + log_(sum);
    float lse[GP];
#pragma unroll
    for (int h = 0; h < GP; h++) lse[h] = shuffle(mine, h);

    int current = row.position / UNIT;
    for (int i = tid; i < num; i += THREADS) {
        float best = -infinity(), x[GROUP];
#pragma unroll
        for (int h = 0; h < GROUP; h++) {
            x[h] = s.score[i * GP + h] - lse[h];
            best = max_(best, x[h]);
        }
        float total = 0.0f;
        float anchor = finite_or_0(best);
#pragma unroll
        for (int h = 0; h < GROUP; h++) total += exp_(x[h] - anchor);
        int unit = first + i;
        bool forced = unit < p.first || unit > current - p.last;
        s.keys[unit] = forced ? HIGHEST : min_(max_(ordered(anchor + log_(total)), LOWEST + 1), HIGHEST - 1);
    }
    sync_workers();
    int quads = ceil_div(num, 4);  // what lies behind the last unit is read by nobody
    for (int i = tid; i < quads * (blocks - 1); i += THREADS) {
        int to = i / quads;
        to += to >= block_x();
        int *quad = s.keys + first + i % quads * 4;
        *of_block((Words *)quad, to) = *(const Words *)quad;
    }
}

// The `wanted` units of largest key, ties to the lower index, as an ascending list; and this block's masses of them
// removed. All eight warps.
DEVICE void select(const Shared &s, int num_units, int wanted, int first, int num, int tid) {
    int lane = tid % 32, warp = tid / 32;
    int per_warp = ceil_div(num_units, THREADS) * 32;  // neighbouring units, so that a prefix sum orders them
    int start = warp * per_warp, stop = min_(start + per_warp, num_units);
    int low_key = HIGHEST, high_key = LOWEST, forced = 0;
    for (int i = start + lane; i < stop; i += 32) {
        int key = s.keys[i];
        if (key == HIGHEST) {
            forced++;
        } else {
            low_key = min_(low_key, key);
            high_key = max_(high_key, key);
        }
    }
    int *count = s.count;
    low_key = warp_min(low_key);
    high_key = warp_max(high_key);
    forced = warp_sum(forced);
    if (lane == 0) {
        count[warp * 4] = low_key;
        count[warp * 4 + 1] = high_key;
        count[warp * 4 + 2] = forced;
    }
    sync_workers();
    forced = 0;
    for (int w = 0; w < WARPS; w++) {
        low_key = min_(low_key, count[w * 4]);
        high_key = max_(high_key, count[w * 4 + 1]);
        forced += count[w * 4 + 2];
    }
    // Invariant: count(key >= lower) >= wanted > count(key >= upper).
    i64 lower = low_key, upper = (i64)high_key + 1;
    int at_lower = num_units;
    if (wanted <= forced) {  // the forced units fill the budget
        lower = HIGHEST;
        upper = lower + 1;
        at_lower = forced;
    }
    for (int step = 1; at_lower != wanted && upper - lower > 1; step++) {
        i64 width = upper - lower;
        int cut[3];
#pragma unroll
        for (int c = 0; c < 3; c++) cut[c] = (int)(lower + (width * (c + 1) + 3) / 4);  // above lower, at most upper
        u32 one = 0, two = 0;  // counts of the first two cuts in the halves of one number
#pragma unroll 4
        for (int i = start + lane; i < stop; i += 32) {
            int key = s.keys[i];
            one += (key >= cut[0] ? 1u : 0u) + (key >= cut[1] ? 65536u : 0u);
            two += key >= cut[2] ? 1u : 0u;
        }
        one = warp_sum(one);
        two = warp_sum(two);
        count = s.count + (step & 1) * WARPS * 4;  // two buffers: one barrier a step is enough
        if (lane == 0) {
            count[warp * 4] = one & 65535;
            count[warp * 4 + 1] = one >> 16;
            count[warp * 4 + 2] = two;
        }
        sync_workers();
        int at[3] = {0, 0, 0};
#pragma unroll
        for (int w = 0; w < WARPS; w++) {
            Words x = *(const Words *)(count + w * 4);
#pragma unroll
            for (int c = 0; c < 3; c++) at[c] += (int)x.x[c];
        }
#pragma unroll
        for (int c = 0; c < 3; c++) {
            if (at[c] >= wanted) {
                lower = cut[c];
                at_lower = at[c];
            }
        }
#pragma unroll
        for (int c = 2; c >= 0; c--)
            if (at[c] < wanted && cut[c] > lower) upper = cut[c];
    }
    // Everything above the threshold; at the threshold as many as are still wanted, in order.
    int threshold = (int)lower;
    int above = 0, tied = 0;
    for (int i = start + lane; i < stop; i += 32) {
        int key = s.keys[i];
        above += key > threshold;
        tied += key == threshold;
    }
    above = warp_sum(above);
    tied = warp_sum(tied);
    sync_workers();  // the last counts have been read
    count = s.count;
    if (lane == 0) {
        count[warp * 4] = above;
        count[warp * 4 + 1] = tied;
    }
    sync_workers();
    int total_above = 0, before = 0, tied_before = 0;
    for (int w = 0; w < WARPS; w++) total_above += count[w * 4];
    int allowed = wanted - total_above;
    for (int w = 0; w < warp; w++) {
        before += count[w * 4];
        tied_before += count[w * 4 + 1];
    }
    u32 lanes_before = (1u << lane) - 1;
    for (int i = start; i < start + per_warp && i < num_units; i += 32) {
        int key = i + lane < num_units ? s.keys[i + lane] : LOWEST;
        bool is_above = key > threshold, is_tied = key == threshold && i + lane < num_units;
        u32 all_above = ballot(is_above), all_tied = ballot(is_tied);
        int rank = tied_before + popcount(all_tied & lanes_before);
        if (is_above || (is_tied && rank < allowed)) {
            int ties = min_(rank, allowed);
            s.list[before + popcount(all_above & lanes_before) + ties] = i + lane;
#if RESIDUAL
            int mine = i + lane - first;
            if (mine >= 0 && mine < num)
#pragma unroll
                for (int h = 0; h < GP; h++) s.mass[mine * GP + h] = -infinity();
#endif
        }
        before += popcount(all_above);
        tied_before += popcount(all_tied);
    }
}

// ----------------------------------------------------------------------------------------------------- attention

struct Tokens {
    int limit;       // of the list: tokens that exist
    int covered;     // of these, leading ones that the state covers
    int start, stop; // this warp's steps of TOKENS
};

DEVICE const u16 *token_at(const Shared &s, const Row &row, bool all, int num_complete, int t) {
    int entry = t / UNIT;
    // Behind the complete units of the list stand the current page's.
    int unit = all ? entry : entry < num_complete ? s.list[entry] : row.num_units + entry - num_complete;
    return page_at(row, row.pages[unit / UNITS_PER_PAGE]) + (unit % UNITS_PER_PAGE * UNIT + t % UNIT) * ROW;
}

DEVICE void issue_step(const Shared &s, const Row &row, const Tokens &n, bool all, int num_complete, int k, int warp) {
    Barrier *full = s.barriers + warp * (STAGES + STEPS) + STAGES + k % STEPS;
    const u16 *from = token_at(s, row, all, num_complete, (n.start + k) * TOKENS);
    expect(full, STEP_BYTES);
    copy_in(s.ring + warp * RING_BYTES + k % STEPS * STEP_BYTES, from, STEP_BYTES, full);
}

// Partial sums of one warp: softmax and residual numerators in `part [PART_ROWS][D]` (its ring), and in
// `s.warp [warp][4][GP]` maxima, sums and sums of logits.
DEVICE void attend(const Shared &s, const Row &row, const Tokens &n, bool all, int num_complete, bool reads, int warp, int lane) {
    constexpr int N = LANE_KEYS * GP;
    constexpr int SUMS = N > CHUNKS ? N / CHUNKS : 1;  // (token, head) pairs a lane has after the reduction
    char *ring = s.ring + warp * RING_BYTES;
    float *weights = s.weights + warp * TOKENS * 2 * GP;
    int column = lane % VALUE_LANES * 4, value_sub = lane / VALUE_LANES;
    int chunk = lane % CHUNKS, key_sub = lane / CHUNKS;
    float top[SUMS], sum[SUMS], z[SUMS];
#pragma unroll
    for (int i = 0; i < SUMS; i++) {
        top[i] = -infinity();
        sum[i] = 0.0f;
        z[i] = 0.0f;
    }
    float exact[GP][4] = {}, rest[GP][4] = {}, v_sum[4] = {};
    for (int k = 0; n.start + k < n.stop; k++) {
        int first = (n.start + k) * TOKENS;
        bool subtract = RESIDUAL && reads && first < n.covered;
        const char *rows = ring + k % STEPS * STEP_BYTES;
        wait(s.barriers + warp * (STAGES + STEPS) + STAGES + k % STEPS, k / STEPS & 1);
        float logit[N];
        Words keys[LANE_KEYS];
#pragma unroll
        for (int i = 0; i < LANE_KEYS; i++)
            keys[i] = *(const Words *)(rows + (i * KEYS_AT_ONCE + key_sub) * ROW_BYTES + chunk * 16);
#pragma unroll
        for (int h = 0; h < GP; h++) {
            Four a = *(const Four *)(s.query + h * D + chunk * 8), b = *(const Four *)(s.query + h * D + chunk * 8 + 4);
#pragma unroll
            for (int i = 0; i < LANE_KEYS; i++) {
                logit[i * GP + h] = low(keys[i].x[0]) * a.x[0] + high(keys[i].x[0]) * a.x[1] + low(keys[i].x[1]) * a.x[2] +
                                    high(keys[i].x[1]) * a.x[3] + low(keys[i].x[2]) * b.x[0] + high(keys[i].x[2]) * b.x[1] +
                                    low(keys[i].x[3]) * b.x[2] + high(keys[i].x[3]) * b.x[3];
            }
        }
        Reduce<N, CHUNKS>::run(logit, lane);
        float decay[SUMS];
        bool moved = false;
#pragma unroll
        for (int i = 0; i < SUMS; i++) {
            int index = chunk * N / CHUNKS + i;
            int token = index / GP * KEYS_AT_ONCE + key_sub;
            bool exists = first + token < n.limit;
            // The lanes of a head differ in bits 2 to 4 of their number.
            float best = exists ? logit[i] : -infinity();
            best = max_(best, shuffle_xor(best, 4));
            best = max_(best, shuffle_xor(best, 8));
            best = max_(max_(best, shuffle_xor(best, 16)), top[i]);
            moved = moved || best > top[i];
            decay[i] = exp_(top[i] - best);
            top[i] = best;
            float weight = exists ? exp_(logit[i] - best) : 0.0f;
            sum[i] = sum[i] * decay[i] + weight;
            float feature = subtract ? logit[i] : 0.0f;
            z[i] += feature;
            weights[token * 2 * GP + index % GP] = weight;
            weights[token * 2 * GP + GP + index % GP] = feature;
        }
        if (ballot(moved)) {
#pragma unroll
            for (int h = 0; h < GP; h++) {
                // A lane that has head h: lanes 0 .. 3 have all of them.
                float factor = shuffle(decay[h % SUMS], SUMS > 1 ? h / SUMS : h * (4 / GP));
#pragma unroll
                for (int j = 0; j < 4; j++) exact[h][j] *= factor;
            }
        }
        sync_warp();  // all weights are written
#pragma unroll
        for (int i = 0; i < TOKENS; i += VALUES_AT_ONCE) {
            int token = i + value_sub;
            Pair two = *(const Pair *)(rows + token * ROW_BYTES + 2 * (D + column));
            float v[4] = {low(two.x[0]), high(two.x[0]), low(two.x[1]), high(two.x[1])};
            if (first + TOKENS > n.limit && first + token >= n.limit)  // whatever lies behind the last token, NaN too
#pragma unroll
                for (int j = 0; j < 4; j++) v[j] = 0.0f;
            const float *w = weights + token * 2 * GP;
#pragma unroll
            for (int h = 0; h < GP; h++)
#pragma unroll
                for (int j = 0; j < 4; j++) exact[h][j] += w[h] * v[j];
            if (subtract) {
#pragma unroll
                for (int h = 0; h < GP; h++)
#pragma unroll
                    for (int j = 0; j < 4; j++) rest[h][j] += w[GP + h] * v[j];
#pragma unroll
                for (int j = 0; j < 4; j++) v_sum[j] += v[j];
            }
        }
        sync_warp();  // all lanes have read the rows and the weights
        if (lane == 0 && n.start + k + STEPS < n.stop) issue_step(s, row, n, all, num_complete, k + STEPS, warp);
    }
#pragma unroll
    for (int i = 0; i < SUMS; i++) {
#pragma unroll
        for (int other = 4; other < 32; other *= 2) {
            sum[i] += shuffle_xor(sum[i], other);
            z[i] += shuffle_xor(z[i], other);
        }
        int head = (chunk * N / CHUNKS + i) % GP;
        if (lane < 4) {  // lanes of the same head write the same
            s.warp[warp * 4 * GP + head] = top[i];
            s.warp[warp * 4 * GP + GP + head] = sum[i];
            s.warp[warp * 4 * GP + 2 * GP + head] = z[i];
        }
    }
    if constexpr (VALUES_AT_ONCE > 1) {
#pragma unroll
        for (int h = 0; h < GP; h++)
#pragma unroll
            for (int j = 0; j < 4; j++) {
                exact[h][j] += shuffle_xor(exact[h][j], VALUE_LANES);
                rest[h][j] += shuffle_xor(rest[h][j], VALUE_LANES);
            }
#pragma unroll
        for (int j = 0; j < 4; j++) v_sum[j] += shuffle_xor(v_sum[j], VALUE_LANES);
    }
    if (value_sub == 0) {
        float *part = (float *)ring;
#pragma unroll
        for (int h = 0; h < GP; h++) {
            *(Four *)(part + h * D + column) = {{exact[h][0], exact[h][1], exact[h][2], exact[h][3]}};
            *(Four *)(part + (GP + h) * D + column) = {{rest[h][0], rest[h][1], rest[h][2], rest[h][3]}};
        }
        *(Four *)(part + 2 * GP * D + column) = {{v_sum[0], v_sum[1], v_sum[2], v_sum[3]}};
    }
}

// The warps' partial results become this block's, the state's share with them; all eight warps.
DEVICE void merge_warps(const Shared &s, bool reads, int tid) {
    sync_workers();
    for (int e = tid; e < PART_ROWS * D / 4; e += THREADS) {
        int r = e / (D / 4);
        float sum[4] = {};
        float top = -infinity();
        if (r < GP)
            for (int w = 0; w < WARPS; w++) top = max_(top, s.warp[w * 4 * GP + r]);
#pragma unroll
        for (int w = 0; w < WARPS; w++) {
            Four x = *(const Four *)((const float *)(s.ring + w * RING_BYTES) + e * 4);
            float weight = 1.0f;
            if (r < GP) weight = exp_(s.warp[w * 4 * GP + r] - finite_or_0(top));
#pragma unroll
            for (int j = 0; j < 4; j++) sum[j] += weight * x.x[j];
        }
        if (r >= GP) {  // the rest is what the state has and the selection has not
            Four x = {{0, 0, 0, 0}};
            if (RESIDUAL && reads) x = *(const Four *)(s.read + (e - GP * D / 4) * 4);
#pragma unroll
            for (int j = 0; j < 4; j++) sum[j] = x.x[j] - sum[j];
        }
        *(Four *)(s.part + e * 4) = {{sum[0], sum[1], sum[2], sum[3]}};
    }
    if (tid < GP) {
        float top = -infinity(), sum = 0.0f, z = RESIDUAL && reads ? s.mine[2 * GP + tid] : 0.0f;
        for (int w = 0; w < WARPS; w++) top = max_(top, s.warp[w * 4 * GP + tid]);
        for (int w = 0; w < WARPS; w++) {
            sum += s.warp[w * 4 * GP + GP + tid] * exp_(s.warp[w * 4 * GP + tid] - finite_or_0(top));
            z -= s.warp[w * 4 * GP + 2 * GP + tid];
        }
        s.mine[tid] = top;
        s.mine[GP + tid] = sum;
        s.mine[2 * GP + tid] = z;
    }
    sync_workers();
}

// Merge the blocks of the cluster, combine, and write this block's slice of the output; all eight warps.
DEVICE void merge_blocks(const Shared &s, const Row &row, const Params &p, i64 token, int num_rest, int rank, int blocks, int tid) {
    float *weight = s.final_;                   // [MAX_CLUSTER][GP]: of a block's exact part
    float *share = s.final_ + MAX_CLUSTER * GP; // [GP]: of the tail in the output
    float *mean_qk = share + GP;                // [GP]
    float per_token = num_rest > 0 ? 1.0f / (float)num_rest : 0.0f;
    if (tid < GP) {
        const float *x = s.scalars + tid;  // [blocks][SCALARS][GP]
        float top = -infinity(), sum = 0.0f, z = 0.0f, mass_top = -infinity(), mass = 0.0f;
        for (int b = 0; b < blocks; b++) {
            top = max_(top, x[b * SCALARS * GP]);
            mass_top = max_(mass_top, x[(b * SCALARS + 3) * GP]);
        }
        for (int b = 0; b < blocks; b++) {
            float decay = exp_(x[b * SCALARS * GP] - top);
            weight[b * GP + tid] = decay;
            sum += decay * x[(b * SCALARS + 1) * GP];
            z += x[(b * SCALARS + 2) * GP];
            mass += exp_(x[(b * SCALARS + 3) * GP] - finite_or_0(mass_top)) * x[(b * SCALARS + 4) * GP];
        }
        for (int b = 0; b < blocks; b++) weight[b * GP + tid] /= sum;
        float gain = tid < GROUP ? p.gain[row.head * GROUP + tid] : 0.0f;
        float tail = 0.0f;
        if (num_rest > 0 && gain > 0.0f && mass > 0.0f)
            tail = 1.0f / (1.0f + exp_(top + log_(sum) - mass_top - log_(mass) - log_(gain)));
        share[tid] = tail;
        mean_qk[tid] = z * per_token;
    }
    sync_workers();
    int lanes = min_(blocks, 8);  // that read an element together, each from some of the blocks
    int slice = ceil_div(GROUP * D, blocks);
    int lane = tid % lanes;
    for (int e = tid / lanes; e < slice; e += THREADS / lanes) {
        int at = rank * slice + e;
        bool exists = at < GROUP * D;
        int h = exists ? at / D : 0, column = at % D;
        float exact = 0.0f, rest = 0.0f, v = 0.0f;
        if (exists)
            for (int b = lane; b < blocks; b += lanes) {
                const float *part = of_block(s.part, b);
                exact += weight[b * GP + h] * part[h * D + column];
                if (RESIDUAL && num_rest > 0) {
                    rest += part[(GP + h) * D + column];
                    v += part[2 * GP * D + column];
                }
            }
        for (int other = 1; other < lanes; other *= 2) {
            exact += shuffle_xor(exact, other);
            rest += shuffle_xor(rest, other);
            v += shuffle_xor(v, other);
        }
        if (exists && lane == 0) {
            float out = exact;
            if (RESIDUAL && share[h] > 0.0f) {
                float mean_v = v * per_token;
                float tail = mean_v + p.residual_scale * (rest * per_token - mean_qk[h] * mean_v);
                out = exact + share[h] * (tail - exact);
            }
            p.output[token * p.output_token_stride + (row.head * GROUP + h) * p.output_head_stride + column] = rounded(out);
        }
    }
}

// Grid (blocks of a cluster, G, rows), clusters of (gridDim.x, 1, 1).
KERNEL spla_fused_decode(KERNEL_PARAMS) {
    int tid = thread_id(), warp = tid / 32, lane = tid % 32;
    int rank = block_x(), head = block_y(), blocks = cluster_size();
    Shared s = carve(shared_memory, p, blocks);
    grid_launch();
    if (tid < WARPS * (STAGES + STEPS)) barrier_init(s.barriers + tid);
    barriers_visible();

    // Lengths and tables are the step's and stand long before the launch that is waited for.
    i64 row_index = block_z();
    int seq_len = p.seq_lens[row_index];
    i64 token = p.query_start_loc[row_index];
    bool exists = seq_len > 0 && p.query_start_loc[row_index + 1] > token;
    if (!exists) {
        // Padding. Its output row is ours to clear only behind the tokens of all real rows.
        grid_wait();
        if (rank == 0 && row_index >= p.query_start_loc[p.num_rows])
            for (int e = tid; e < GROUP * D; e += THREADS + 32)
                p.output[row_index * p.output_token_stride + (head * GROUP + e / D) * p.output_head_stride + e % D] = 0;
        return;
    }
    Row row;
    row.pages = p.block_table + row_index * p.block_table_stride;
    row.blocks = p.state_table + row_index * p.state_table_stride;
    row.kv = p.kv + head * p.head_stride;
    row.state = p.state + head * p.state_head_stride;
    row.position = seq_len - 1;
    row.head = head;
    row.page_stride = p.page_stride;
    row.state_block_stride = p.state_block_stride;
    row.last_page = p.last_page;
    int target = row.position / PAGE;  // complete pages
    row.num_units = target * UNITS_PER_PAGE;
    row.num_current = row.position % PAGE / UNIT + 1;
    bool all = row.num_units + row.num_current <= max_(p.budget, p.dense_units);
    bool reads = !all;  // some units are left out
    int num_complete = all ? row.num_units : p.budget - row.num_current;  // complete units of the list
    int share = share_of(row.num_units, blocks);
    int first = min_(rank * share, row.num_units);
    int num = min_(share, row.num_units - first);

    grid_wait();
    for (int e = tid; e < GP * D; e += THREADS + 32) {
        int h = e / D;
        float q = 0.0f;
        if (h < GROUP) q = element(p.query[token * p.query_token_stride + (head * GROUP + h) * p.query_head_stride + e % D]);
        s.query[e] = q * p.scale;
    }
    sync_block();

    int covered = target;
    if (warp == WARPS) {
        if (RESIDUAL && target > 0) {
            covered = trusted_pages(row, target, lane);
            if (covered == target && reads) read_state(s, row, rank, blocks, lane);
        }
        if (lane == 0) s.flags[0] = covered;
    } else if (reads && num > 0) {
        score_units(s, row, first, num, warp, lane);
    }
    sync_block();
    covered = s.flags[0];
    if (RESIDUAL && covered < target) {
        if (warp < WARPS) fold(s, row, rank, blocks, covered, target, warp, lane);
        sync_block();
        if (warp == WARPS && reads) read_state(s, row, rank, blocks, lane);
    }

    if (reads) {
        float top, sum;
        if (warp < WARPS) {
            norm_of(s, s.score, num, tid, top, sum);
            if (tid < GP) {
                s.mine[tid] = top;
                s.mine[GP + tid] = sum;
            }
            sync_workers();
            for (int i = tid; i < blocks * 2 * GP; i += THREADS)
                *of_block(s.norms + rank * 2 * GP + i % (2 * GP), i / (2 * GP)) = s.mine[i % (2 * GP)];
        }
        sync_cluster();
        if (warp < WARPS) share_scores(s, row, p, first, num, blocks, tid);
        sync_cluster();
        if (warp < WARPS) {
            select(s, row.num_units, num_complete, first, num, tid);
            sync_workers();
        }
    } else {
        sync_cluster();  // all blocks have read the headers
    }
    if (RESIDUAL && warp == WARPS && rank == 0 && covered < target) write_headers(row, target, lane);

    if (warp < WARPS) {
        Tokens n;
        n.covered = num_complete * UNIT;
        n.limit = (num_complete + row.num_current - 1) * UNIT + row.position % UNIT + 1;
        int steps = ceil_div(n.limit, TOKENS);
        int per_warp = ceil_div(steps, blocks * WARPS);
        n.start = min_((rank * WARPS + warp) * per_warp, steps);
        n.stop = min_(n.start + per_warp, steps);
        if (lane < STEPS && n.start + lane < n.stop) {
            before_copies();
            issue_step(s, row, n, all, num_complete, lane, warp);
        }
        sync_warp();
        if (rank == 0) {
            int entries = num_complete + row.num_current;
            i64 pair = token * p.num_kv_heads + head;
            for (int i = tid; i < min_(entries, p.table_width); i += THREADS) {
                int unit = all ? i : i < num_complete ? s.list[i] : row.num_units + i - num_complete;
                int page = min_(max_(row.pages[unit / UNITS_PER_PAGE], 0), p.last_page);
                p.table[pair * p.table_width + i] = (page * p.num_kv_heads + head) * UNITS_PER_PAGE + unit % UNITS_PER_PAGE;
            }
            if (tid == 0) p.count[pair] = entries;
        }
        if (RESIDUAL && reads) {  // while the tokens come in
            float top, sum;
            norm_of(s, s.mass, num, tid, top, sum);
            if (tid < GP) {
                s.mine[3 * GP + tid] = top;
                s.mine[4 * GP + tid] = sum;
            }
            sync_workers();  // `s.warp` is free again
        }
        attend(s, row, n, all, num_complete, reads, warp, lane);
    }
    sync_block();  // the state's share has been read
    if (warp < WARPS) {
        merge_warps(s, reads, tid);
        for (int i = tid; i < blocks * SCALARS * GP; i += THREADS)
            *of_block(s.scalars + rank * SCALARS * GP + i % (SCALARS * GP), i / (SCALARS * GP)) = s.mine[i % (SCALARS * GP)];
    }
    sync_cluster();
    if (warp < WARPS) merge_blocks(s, row, p, token, reads ? (row.num_units - num_complete) * UNIT : 0, rank, blocks, tid);
    sync_cluster();  // nobody leaves while others read its shared memory
}

}  // namespace spla
