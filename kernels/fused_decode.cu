// SPLA decode of one layer in one launch: a thread block cluster a (row, kv head).
//
// The launches of `triton_decode` wait for each other through device memory, and at small batches that is all they do.
// Here a cluster of up to 16 thread blocks scores its pages, agrees on a selection, attends and merges through
// distributed shared memory. `fused_decode.py` compiles (NVRTC) and launches it, and says what it covers; the plain
// reference is `reference.spla_token`, the plain peer on a GPU `TritonPagedSpla`.
//
// Steps of a thread block (docs/design.md, 1 to 6, for what is computed):
//   1. score the units (selection blocks) of the block's share; meanwhile one warp asks whether the recurrent state is
//      valid for this sequence. Where it lacks pages, fold them in
//   2. normalisers of all heads are exchanged, group scores computed and sent to all blocks of the cluster
//   3. every block finds the same threshold and the same list; each attends to its share of the list's tokens, and reads
//      its rows of the state
//   4. partial results are merged over warps, then over the cluster, a slice of the output a block
//
// Statistics, keys and values come by asynchronous copies into a ring that a warp owns: no warp waits for another.
// What is read is a dense row of `2 D` elements in all cases: mean and variance of a unit, key and value of a token.
//
// Floor, bytes a (row, kv head): `2 D` elements a unit and 4 bytes a page; `2 D` elements a selected token;
// `(D + 2) D` float32 of state. FLOP: `4 GROUP D` a unit, `8 GROUP D` a selected token, on tensor cores that are mostly empty.
//
// Compiled with: D, GROUP, PAGE, UNIT (tokens a selection block), FP16 (0: bf16), SELECTOR, RESIDUAL (0 none,
// 1 regression), NUM_BLOCKS, BODY (state blocks a request, body rows a block), STAMP_WORD, MAGIC, LOG_UNIT (log of UNIT),
// BLOCKS (of a cluster).

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
constexpr int WARPS = 8;
constexpr int THREADS = WARPS * 32;
constexpr int ROW = 2 * D;                 // elements of a row
constexpr int ROW_BYTES = 2 * ROW;
constexpr int UNITS_PER_PAGE = PAGE / UNIT;
constexpr int STRIDE = ROW_BYTES + 16;     // bytes between rows in shared memory: eight rows lie in different banks
constexpr int TILE = 8;                    // rows of a matrix tile
constexpr int RING_ROWS = 4096 / D;                      // rows a warp has in flight
constexpr int STAGES = RING_ROWS / TILE;                 // scoring goes by 8 units
constexpr int TOKENS = 16;                               // attention by 16 tokens
constexpr int STEPS = RING_ROWS / TOKENS;
constexpr int RING_BYTES = RING_ROWS * STRIDE;           // a warp; later its partial result
constexpr int QUERY_STRIDE = D + 8;                      // elements
// Columns of the weights W in W^T V: softmax weights, feature weights in two parts, ones; for each head, and one.
constexpr int COLUMNS = RESIDUAL ? 3 * GP + 1 : GP;
constexpr int COLUMN_TILES = (COLUMNS + 7) / 8;
constexpr int PART_STRIDE = D + 4;                       // floats
constexpr int PART_ROWS = RESIDUAL ? 2 * GP + 1 : GP;    // exact, residual of each head; sum of values
constexpr int SCALARS = 4;                               // a head: maximum, sum, phi(q) . z, mass of the rest
constexpr int MAX_CLUSTER = 16;
constexpr int BINS = 256;
constexpr int STATE_LANES = D / 4;                       // lanes of a row of the state, or of a value: 4 elements each
constexpr int STATE_ROWS_AT_ONCE = 32 / STATE_LANES;
constexpr float LOG2E = 1.4426950408889634f;
constexpr float LN2 = 0.6931471805599453f;
constexpr u32 FORCED = 0xffffffffu;        // key of a unit that is selected anyway

static_assert(COLUMN_TILES * 8 * PART_STRIDE * 4 <= RING_BYTES, "a warp's partial result fits into its ring");

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
    float scale, residual_scale;
};

#ifndef SPLA_EMULATE  // ------------------------------------------------------------- the hardware, in one place each

#define DEVICE static __device__ __forceinline__
extern __shared__ __align__(128) char shared_memory[];

DEVICE int thread_id() { return threadIdx.x; }
DEVICE int block_x() { return blockIdx.x; }
DEVICE int block_y() { return blockIdx.y; }
DEVICE int block_z() { return blockIdx.z; }
DEVICE u32 shared_address(const void *p) { return (u32)__cvta_generic_to_shared(p); }
DEVICE float shuffle_xor(float x, int mask) { return __shfl_xor_sync(0xffffffffu, x, mask); }
DEVICE float shuffle(float x, int lane) { return __shfl_sync(0xffffffffu, x, lane); }
DEVICE int shuffle(int x, int lane) { return __shfl_sync(0xffffffffu, x, lane); }
DEVICE u32 ballot(bool x) { return __ballot_sync(0xffffffffu, x); }
DEVICE u32 warp_sum(u32 x) { return __reduce_add_sync(0xffffffffu, x); }
DEVICE u32 warp_min(u32 x) { return __reduce_min_sync(0xffffffffu, x); }
DEVICE u32 warp_max(u32 x) { return __reduce_max_sync(0xffffffffu, x); }
DEVICE u32 shuffle_up(u32 x, int by) { return __shfl_up_sync(0xffffffffu, x, by); }
DEVICE int popcount(u32 x) { return __popc(x); }
DEVICE int leading_zeros(u32 x) { return __clz(x); }
DEVICE void add_to(u32 *p, u32 x) { atomicAdd(p, x); }
DEVICE void prefetch(const void *p) { asm volatile("prefetch.global.L2 [%0];" ::"l"((u64)p)); }
DEVICE void sync_warp() { __syncwarp(); }
DEVICE void sync_block() { __syncthreads(); }
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

// Four 8x8 matrices of 16-bit elements: lane `l` names row `l % 8` of matrix `l / 8`, and gets two neighbours of row
// `l / 4` of each; transposed, of column `l / 4`.
DEVICE void load_tiles(u32 (&x)[4], const void *row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3]) : "r"(shared_address(row)) : "memory");
}
DEVICE void load_tiles_transposed(u32 (&x)[4], const void *row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3]) : "r"(shared_address(row)) : "memory");
}
#if FP16
#define MMA_TYPE "f16"
#else
#define MMA_TYPE "bf16"
#endif
// c [16, 8] += a [16, 16] b [16, 8]: m16n8k16.
DEVICE void multiply(float (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." MMA_TYPE "." MMA_TYPE ".f32 "
                 "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// 16 bytes a lane, in groups that a lane closes and waits for itself: the bulk copy engine takes far fewer rows of 512 bytes a second.
DEVICE void copy_in(void *to, const void *from) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(to)), "l"((u64)from) : "memory");
}
DEVICE void close_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// All groups but the last `N` have arrived.
template <int N> DEVICE void wait_copies() { asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory"); }

#define KERNEL extern "C" __global__ void __launch_bounds__(THREADS, 1)
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

DEVICE u32 two(float a, float b) { return (u32)rounded(a) | (u32)rounded(b) << 16; }

// Unsigned that compares as the float does, and is neither 0 nor one of the two largest.
DEVICE u32 ordered(float x) {
    u32 bits = (u32)as_int(x);
    bits = bits >> 31 ? ~bits : bits | 0x80000000u;
    return bits < 1u ? 1u : bits > FORCED - 2 ? FORCED - 2 : bits;
}

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
    u32 *keys;        // [max_units]: group scores of all units, in their order; shares the ring's memory where it can
    float *score;     // [share][GP]: of this block's units
    float *mass;      // [share][GP], where there is a residual
    int *list;        // [budget]: selected units, where some are left out
    u16 *query;       // [3][8][QUERY_STRIDE]: q; q^2 in two parts, normalised; row `r` is head `r % GP`
    float *scaled;    // [GP][D]: q times the softmax scale
    float *restore;   // [GP]: what undoes the normalisation of q^2
    float *part;      // [PART_ROWS][D]: this block's partial result; shares the scores' memory where it can
    float *gain;      // [GP]
    float *norms;     // [MAX_CLUSTER][2 GP]: maxima and sums of the blocks' scores
    u32 *ranges;      // [MAX_CLUSTER][2]: least and largest key of the blocks, forced units left out
    float *lse;       // [GP], of all scores
    float *scalars;   // [MAX_CLUSTER][SCALARS][GP]: of all blocks
    float *mine;      // [SCALARS][GP]: of this block
    float *warp;      // [WARPS][SCALARS][GP]
    float *final_;    // [MAX_CLUSTER + 4][GP]
    u32 *bins;        // [3][BINS]
    u32 *count;       // [2][WARPS]
    int *flags;       // [4]
};

// Units of a block's share.
DEVICE int share_of(int units) { return (ceil_div(units, BLOCKS) + 3) / 4 * 4; }

// `kernels/fused_decode.py: shared_bytes` adds up the same.
DEVICE Shared carve(char *base, const Params &p) {
    Shared s;
    char *at = base;
    int share = share_of(p.max_units);
#define TAKE(field, type, n) s.field = (type *)at; at += ((n) * sizeof(type) + 15) / 16 * 16;
    TAKE(ring, char, WARPS * RING_BYTES)
    // No warp scores any more when keys are written, nor has a token been asked for before they are read.
    s.keys = (u32 *)s.ring;
    if (p.max_units * 4 > WARPS * RING_BYTES) {
        TAKE(keys, u32, (p.max_units + 3) / 4 * 4)
    }
    TAKE(score, float, share * GP)
    // Nobody needs the scores of single heads any more when the partial result is written.
    s.part = s.score;
    if (share * GP < PART_ROWS * D) {
        TAKE(part, float, PART_ROWS * D)
    }
    TAKE(mass, float, RESIDUAL ? share * GP : 0)
    TAKE(list, int, p.budget)
    TAKE(query, u16, 3 * 8 * QUERY_STRIDE)
    TAKE(scaled, float, GP * D)
    TAKE(restore, float, GP)
    TAKE(gain, float, GP)
    TAKE(norms, float, MAX_CLUSTER * 2 * GP)
    TAKE(ranges, u32, MAX_CLUSTER * 2)
    TAKE(lse, float, GP)
    TAKE(scalars, float, MAX_CLUSTER * SCALARS * GP)
    TAKE(mine, float, SCALARS * GP)
    TAKE(warp, float, WARPS * SCALARS * GP)
    TAKE(final_, float, (MAX_CLUSTER + 4) * GP)
    TAKE(bins, u32, 3 * BINS)
    TAKE(count, u32, 2 * WARPS)
    TAKE(flags, int, 4)
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
    int head;
    i64 page_stride, state_block_stride;
    int last_page;
};

// Page ids come from the engine; one that no page has must not lead out of the cache.
DEVICE int within_cache(const Row &row, int id) { return min_(max_(id, 0), row.last_page); }

DEVICE const u16 *page_at(const Row &row, int id) {
    return row.kv + (i64)within_cache(row, id) * row.page_stride;
}

DEVICE float *state_row(const Row &row, int t) {
    i64 block = max_(row.blocks[t / BODY], 0);
    return row.state + block * row.state_block_stride + (1 + t % BODY) * D;
}

// ------------------------------------------------------------------------------------------------ recurrent state

// What decides whether a stored state is trusted, on its way; one warp, a quarter of it a state block. Which page's stamp
// is needed the header says, but it is nearly always one of two, which are asked for together with the headers.
struct Trust {
    int found[(NUM_BLOCKS + 3) / 4];
    int last, before;
};

DEVICE Trust ask_trust(const Row &row, int target, int lane) {
    Trust t;
    int word = lane & 7;
    const u16 *page = page_at(row, row.pages[target - 1]), *other = page_at(row, row.pages[max_(target - 2, 0)]);
    bool of_stamp = word >= 2 && word < 6;
    t.last = of_stamp ? ((const int *)page)[STAMP_WORD + word - 2] : 0;
    t.before = of_stamp ? ((const int *)other)[STAMP_WORD + word - 2] : 0;
#pragma unroll
    for (int i = 0; i < (NUM_BLOCKS + 3) / 4; i++) {
        int block = min_(i * 4 + lane / 8, NUM_BLOCKS - 1);
        t.found[i] = ((const int *)(row.state + (i64)max_(row.blocks[block], 0) * row.state_block_stride))[word];
    }
    return t;
}

// Pages that the stored state covers for this very sequence, 0 where it cannot be trusted.
DEVICE int trusted_pages(const Trust &t, const Row &row, int target, int lane) {
    int word = lane & 7;
    int covered = shuffle(t.found[0], 1);
    bool right = covered > 0 && covered <= target;
    int stamp = covered == target ? t.last : t.before;
    if (right && covered < target - 1 && word >= 2 && word < 6)
        stamp = ((const int *)page_at(row, row.pages[covered - 1]))[STAMP_WORD + word - 2];
#pragma unroll
    for (int i = 0; i < (NUM_BLOCKS + 3) / 4; i++) {
        int block = min_(i * 4 + lane / 8, NUM_BLOCKS - 1);
        int expected = word == 0 ? MAGIC : word == 1 ? covered : word == 6 ? block : word == 7 ? 0 : stamp;
        right = right && t.found[i] == expected;
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

// Fold the pages `covered .. target - 1` into this block's rows of the state. A warp has some rows, or,
// where a block has few rows, some of the tokens of each page, and the sums meet in the ring.
DEVICE void fold(const Shared &s, const Row &row, int rank, int covered, int target, int warp, int lane) {
    constexpr int MOST = 8;  // rows at a time
    int num_rows = D / BLOCKS;
    int first_row = rank * num_rows;
    int chunk = min_(MOST, num_rows);
    int num_chunks = num_rows / chunk;
    int sharing = max_(1, WARPS / num_chunks);  // warps a chunk
    int part = warp % sharing;
    int column = lane % STATE_LANES * 4;
    int sub = lane / STATE_LANES;
    for (int first_chunk = 0; first_chunk < num_chunks; first_chunk += WARPS / sharing) {
        int c = first_chunk + warp / sharing;
        int base = first_row + c * chunk;
        float sum[MOST][4] = {}, z[MOST] = {}, v_sum[4] = {};
        for (int index = covered; index < target; index++) {
            const u16 *page = page_at(row, row.pages[index]);
#pragma unroll 2
            for (int t = part * STATE_ROWS_AT_ONCE + sub; t < PAGE; t += sharing * STATE_ROWS_AT_ONCE) {
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
        if constexpr (STATE_ROWS_AT_ONCE > 1) {
#pragma unroll
            for (int j = 0; j < 4; j++) v_sum[j] += shuffle_xor(v_sum[j], STATE_LANES);
#pragma unroll
            for (int i = 0; i < MOST; i++) {
                z[i] += shuffle_xor(z[i], STATE_LANES);
#pragma unroll
                for (int j = 0; j < 4; j++) sum[i][j] += shuffle_xor(sum[i][j], STATE_LANES);
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
        sync_block();
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
        sync_block();
    }
}

// A warp's rows of the state: phi(q) S, phi(q) . z, sum v.
struct StateRead {
    float s[GP][4];  // of the columns `lane % (D / 4) * 4 ..`
    float z[GP];
    float v[4];
};

struct StateRows {
    int first, num;
};

DEVICE StateRows state_rows(int rank, int warp) {
    int num_rows = D / BLOCKS;  // of this block
    int per_warp = max_(1, num_rows / WARPS);
    if (warp * per_warp >= num_rows) return {0, 0};
    return {rank * num_rows + warp * per_warp, per_warp};
}

DEVICE void prefetch_state(const Row &row, int rank, int tid) {
    constexpr int LINES = (D * 4 + 127) / 128;  // of a row
    int num_rows = D / BLOCKS;
    for (int i = tid; i < num_rows * LINES; i += THREADS)
        prefetch(state_row(row, rank * num_rows + i / LINES) + i % LINES * 32);
    if (tid < LINES) prefetch(state_row(row, D + 1) + tid * 32);
    if (rank == 0 && tid < LINES) prefetch(state_row(row, D) + tid * 32);
}

DEVICE void read_state(StateRead &out, const Shared &s, const Row &row, int rank, int warp, int lane) {
    StateRows rows = state_rows(rank, warp);
    int column = lane % STATE_LANES * 4, sub = lane / STATE_LANES;
    const float *z = state_row(row, D + 1);
#pragma unroll
    for (int h = 0; h < GP; h++) {
        out.z[h] = 0.0f;
#pragma unroll
        for (int j = 0; j < 4; j++) out.s[h][j] = 0.0f;
    }
#pragma unroll 4
    for (int i = sub; i < rows.num; i += STATE_ROWS_AT_ONCE) {
        Four x = *(const Four *)(state_row(row, rows.first + i) + column);
        float x_z = z[rows.first + i];
#pragma unroll
        for (int h = 0; h < GP; h++) {
            float q = s.scaled[h * D + rows.first + i];
            out.z[h] += q * x_z;
#pragma unroll
            for (int j = 0; j < 4; j++) out.s[h][j] += q * x.x[j];
        }
    }
    Four x = {{0, 0, 0, 0}};
    if (rank == 0 && warp == 0) x = *(const Four *)(state_row(row, D) + column);
#pragma unroll
    for (int j = 0; j < 4; j++) out.v[j] = x.x[j];
    if constexpr (STATE_ROWS_AT_ONCE > 1) {
#pragma unroll
        for (int h = 0; h < GP; h++) {
            out.z[h] += shuffle_xor(out.z[h], STATE_LANES);
#pragma unroll
            for (int j = 0; j < 4; j++) out.s[h][j] += shuffle_xor(out.s[h][j], STATE_LANES);
        }
    }
}

// ------------------------------------------------------------------------------------------------------- scoring

// Shares of a block are cut into tiles of 8 units; warp `w` has the tiles `w`, `w + 8`, ... Lanes `0 .. 7` fetch.
DEVICE int tiles_of(int num, int warp) {
    int tiles = ceil_div(num, TILE);
    return tiles > warp ? ceil_div(tiles - warp, WARPS) : 0;
}

// Page id of the unit `r` of a warp's `k`-th tile; behind the last unit, the last again.
DEVICE int unit_of(int first, int num, int warp, int k, int r) { return first + min_((warp + k * WARPS) * TILE + r, num - 1); }

// Ask for a tile; lane `from_lane + r` has the page id of its unit `r`.
DEVICE void issue_tile(
    const Shared &s, const Row &row, int first, int num, int k, int id, int from_lane, int warp, int lane) {
    char *to = s.ring + warp * RING_BYTES + k % STAGES * TILE * STRIDE + lane % STATE_LANES * 16;
#pragma unroll
    for (int j = 0; j < TILE; j += STATE_ROWS_AT_ONCE) {
        int r = j + lane / STATE_LANES;
        int unit = unit_of(first, num, warp, k, r);
        const u16 *from = page_at(row, shuffle(id, from_lane + r)) + (PAGE + unit % UNITS_PER_PAGE) * ROW;
        copy_in(to + r * STRIDE, from + lane % STATE_LANES * 8);
    }
}

// Scores, and masses where there is a residual, of this block's units. The first `STAGES` tiles have been asked for.
DEVICE void score_units(const Shared &s, const Row &row, const Params &p, int first, int num, int warp, int lane) {
    const char *ring = s.ring + warp * RING_BYTES;
    int tiles = tiles_of(num, warp);
    int next_id = lane < TILE && STAGES < tiles ? row.pages[unit_of(first, num, warp, STAGES, lane) / UNITS_PER_PAGE] : 0;

    // The heads are the rows of the left side: `q` for the first half of a statistic; for the second `q^2`, its low part
    // in the rows 8 to 15. For quest the negative and the positive part of q, and rows 8 to 15 are not read.
    u32 q[D / 16][2], square[D / 16][4];
    int matrix = lane / 8, r = lane % 8;
#if SELECTOR == QUEST
    int first_part = 1, second_part = 2;
#else
    int first_part = 0, second_part = 1 + matrix % 2;
#endif
#pragma unroll
    for (int k = 0; k < D / 16; k += 2) {
        u32 x[4];
        load_tiles(x, s.query + (first_part * 8 + r) * QUERY_STRIDE + k * 16 + matrix * 8);
        q[k][0] = x[0];
        q[k][1] = x[1];
        q[k + 1][0] = x[2];
        q[k + 1][1] = x[3];
    }
#pragma unroll
    for (int k = 0; k < D / 16; k++)
        load_tiles(square[k], s.query + (second_part * 8 + r) * QUERY_STRIDE + k * 16 + matrix / 2 * 8);
    int head = lane / 4 % GP;
    float restore = s.restore[head];

    for (int k = 0; k < tiles; k++) {
        wait_copies<STAGES - 1>();
        sync_warp();
        const char *rows = ring + (k % STAGES * TILE + r) * STRIDE + matrix * 16;
        float linear[4] = {}, second[4] = {};
#pragma unroll
        for (int i = 0; i < D / 16; i += 2) {
            u32 x[4];
            load_tiles(x, rows + i * 32);
            multiply(linear, q[i][0], 0, q[i][1], 0, x[0], x[1]);
            multiply(linear, q[i + 1][0], 0, q[i + 1][1], 0, x[2], x[3]);
        }
#pragma unroll
        for (int i = 0; i < D / 16; i += 2) {
            u32 x[4];
            load_tiles(x, rows + 2 * D + i * 32);
            multiply(second, square[i][0], square[i][1], square[i][2], square[i][3], x[0], x[1]);
            multiply(second, square[i + 1][0], square[i + 1][1], square[i + 1][2], square[i + 1][3], x[2], x[3]);
        }
        sync_warp();  // all lanes have read the stage
        if (k + STAGES < tiles) {
            issue_tile(s, row, first, num, k + STAGES, next_id, 0, warp, lane);
            if (lane < TILE && k + STAGES + 1 < tiles)
                next_id = row.pages[unit_of(first, num, warp, k + STAGES + 1, lane) / UNITS_PER_PAGE];
        }
        close_copies();
#pragma unroll
        for (int i = 0; i < 2; i++) {
            int unit = (warp + k * WARPS) * TILE + lane % 4 * 2 + i;
            if (lane / 4 < GP && unit < num) {
#if SELECTOR == QUEST
                s.score[unit * GP + head] = (linear[i] + second[i]) * p.scale;
#else
                float base = LOG_UNIT + linear[i] * p.scale;
                float s2 = max_((second[i] + second[i + 2]) * restore, 0.0f);
                s.score[unit * GP + head] = base + second_order(s2);
#if RESIDUAL
                s.mass[unit * GP + head] = base + log_(1.0f + 0.5f * s2);
#endif
#endif
            }
        }
    }
}

// Maximum of this block's scores and sum of exponentials from it, for each head, to all blocks of the cluster.
DEVICE void share_norms(const Shared &s, int num, int rank, int tid) {
    int lane = tid % 32, warp = tid / 32;
    float top = -infinity();
    for (int i = tid; i < num * GP; i += THREADS) top = max_(top, s.score[i]);
#pragma unroll
    for (int other = GP; other < 32; other *= 2) top = max_(top, shuffle_xor(top, other));
    // Every warp from its own maximum: they are joined below.
    float anchor = finite_or_0(top), sum = 0.0f;
    for (int i = tid; i < num * GP; i += THREADS) sum += exp_(s.score[i] - anchor);
#pragma unroll
    for (int other = GP; other < 32; other *= 2) sum += shuffle_xor(sum, other);
    if (lane < GP) {
        s.warp[warp * 2 * GP + lane] = top;
        s.warp[warp * 2 * GP + GP + lane] = sum;
    }
    sync_block();
    for (int i = tid; i < BLOCKS * GP; i += THREADS) {
        int h = i % GP;
        top = -infinity();
#pragma unroll
        for (int w = 0; w < WARPS; w++) top = max_(top, s.warp[w * 2 * GP + h]);
        anchor = finite_or_0(top);
        sum = 0.0f;
#pragma unroll
        for (int w = 0; w < WARPS; w++) sum += s.warp[w * 2 * GP + GP + h] * exp_(s.warp[w * 2 * GP + h] - anchor);
        float *to = of_block(s.norms + rank * 2 * GP + h, i / GP);
        to[0] = top;
        to[GP] = sum;
    }
}

// Group scores of this block's units, as keys, to all blocks of the cluster.
DEVICE void share_keys(const Shared &s, const Row &row, const Params &p, int first, int num, int rank, int tid) {
    int lane = tid % 32, warp = tid / 32;
    // Normalisers over the blocks: a lane has head `lane % GP` of every so many-th block.
    constexpr int ROUNDS = (MAX_CLUSTER * GP + 31) / 32;
    float tops[ROUNDS], sums[ROUNDS], top = -infinity(), sum = 0.0f;
#pragma unroll
    for (int i = 0; i < ROUNDS; i++) {
        int b = lane / GP + i * (32 / GP);
        tops[i] = b < BLOCKS ? s.norms[b * 2 * GP + lane % GP] : -infinity();
        sums[i] = b < BLOCKS ? s.norms[b * 2 * GP + GP + lane % GP] : 0.0f;
        top = max_(top, tops[i]);
    }
#pragma unroll
    for (int other = GP; other < 32; other *= 2) top = max_(top, shuffle_xor(top, other));
#pragma unroll
    for (int i = 0; i < ROUNDS; i++) sum += sums[i] * exp_(tops[i] - top);
#pragma unroll
    for (int other = GP; other < 32; other *= 2) sum += shuffle_xor(sum, other);
    float mine = top + log_(sum);
    if (tid < GP) s.lse[tid] = mine;
    float lse[GROUP];
#pragma unroll
    for (int h = 0; h < GROUP; h++) lse[h] = shuffle(mine, h);

    int current = row.position / UNIT;
    u32 least = FORCED, largest = 0;
    for (int i = tid; i < num; i += THREADS) {
        float best = -infinity(), x[GROUP];
#pragma unroll
        for (int h = 0; h < GROUP; h++) {
            x[h] = s.score[i * GP + h] - lse[h];
            best = max_(best, x[h]);
        }
        float total = 0.0f, anchor = finite_or_0(best);
#pragma unroll
        for (int h = 0; h < GROUP; h++) total += exp_(x[h] - anchor);
        int unit = first + i;
        u32 key = ordered(anchor + log_(total));
        if (unit < p.first || unit > current - p.last) {
            key = FORCED;
        } else {
            least = key < least ? key : least;
            largest = key > largest ? key : largest;
        }
        s.keys[unit] = key;
    }
    least = warp_min(least);
    largest = warp_max(largest);
    if (lane == 0) {
        s.count[warp] = least;
        s.count[WARPS + warp] = largest;
    }
    sync_block();
    int quads = ceil_div(num, 4);  // what lies behind the last unit is read by nobody
    for (int i = tid; i < quads * (BLOCKS - 1); i += THREADS) {
        int to = i / quads;
        to += to >= rank;
        u32 *quad = s.keys + first + i % quads * 4;
        *of_block((Words *)quad, to) = *(const Words *)quad;
    }
    if (tid < BLOCKS) {
#pragma unroll
        for (int w = 0; w < WARPS; w++) {
            least = s.count[w] < least ? s.count[w] : least;
            largest = s.count[WARPS + w] > largest ? s.count[WARPS + w] : largest;
        }
        u32 *to = of_block(s.ranges + rank * 2, tid);
        to[0] = least;
        to[1] = largest;
    }
}

// The `wanted` units of largest key, ties to the lower index, as an ascending list; and this block's masses of them
// removed. `free` of them are not forced.
DEVICE void select(const Shared &s, int num_units, int wanted, int free, int first, int num, int tid) {
    int lane = tid % 32, warp = tid / 32;
    int per_warp = ceil_div(num_units, THREADS) * 32;  // neighbouring units, so that a prefix sum orders them
    int start = warp * per_warp, stop = min_(start + per_warp, num_units);
    // A lane has every 32nd unit, eight at a time; the first eight stay in registers. Key 0: there is no such unit.
    constexpr int HELD = 8;
    u32 held[HELD];
    auto load = [&](int base, u32 (&key)[HELD]) {
#pragma unroll
        for (int j = 0; j < HELD; j++) {
            int i = base + j * 32 + lane;
            key[j] = i < stop ? s.keys[i] : 0;
        }
    };
    load(start, held);
    auto each_key = [&](auto f) {
#pragma unroll
        for (int j = 0; j < HELD; j++) f(held[j], start + j * 32);
        for (int base = start + HELD * 32; base < stop; base += HELD * 32) {
            u32 key[HELD];
            load(base, key);
#pragma unroll
            for (int j = 0; j < HELD; j++) f(key[j], base + j * 32);
        }
    };
    u32 lower = warp_min(lane < BLOCKS ? s.ranges[lane * 2] : FORCED);
    u32 upper = warp_max(lane < BLOCKS ? s.ranges[lane * 2 + 1] : 0) + 1;
    // Invariant, of the units that are not forced: count(key >= lower) >= free > count(key >= upper) = above.
    int above = 0;
    bool exact = false;  // count(key >= lower) == free
    if (free == 0) {
        lower = FORCED - 1;
        exact = true;
    }
    for (int step = 0; !exact && upper - lower > 1; step++) {
        // A histogram of the keys in between, and the bin in which the threshold lies.
        int shift = max_(24 - leading_zeros(upper - lower - 1), 0);
        u32 *bins = s.bins + step % 3 * BINS;
        s.bins[(step + 1) % 3 * BINS + tid] = 0;  // last read two steps ago
        each_key([&](u32 key, int) {
            if (key >= lower && key < upper) add_to(bins + ((key - lower) >> shift), 1);
        });
        sync_block();
        // Every warp for itself, a lane eight bins, the largest keys in the last lane.
        const Words *mine = (const Words *)(bins + lane * 8);
        Words x = mine[0], y = mine[1];
        u32 sum = x.x[0] + x.x[1] + x.x[2] + x.x[3] + y.x[0] + y.x[1] + y.x[2] + y.x[3];
        u32 upto = sum;  // of the lanes up to this one
#pragma unroll
        for (int by = 1; by < 32; by *= 2) {
            u32 other = shuffle_up(upto, by);
            if (lane >= by) upto += other;
        }
        u32 here = (u32)above + (u32)shuffle((int)upto, 31) - upto;  // keys above this lane's bins
        u32 having = ballot(here + sum >= (u32)free);
        int owner = 31 - leading_zeros(having);  // the last lane with enough from its bins on
        int bin = 0;
        u32 at_bin = here;
        bool found = false;
#pragma unroll
        for (int j = 7; j >= 0; j--) {
            u32 one = j < 4 ? x.x[j % 4] : y.x[j % 4];
            if (!found) {
                at_bin = here + one;
                found = at_bin >= (u32)free;
                bin = j;
                if (!found) here = at_bin;
            }
        }
        bin = shuffle(lane * 8 + bin, owner);
        exact = shuffle((int)at_bin, owner) == free;
        above = shuffle((int)here, owner);
        u32 next = lower + ((u32)(bin + 1) << shift);
        if (bin < BINS - 1 && next < upper) upper = next;
        lower += (u32)bin << shift;
    }
    // Everything above the threshold; of the keys that are equal to it as many as are wanted, in their order.
    u32 threshold = exact ? lower - 1 : lower;
    int allowed = exact ? 0 : free - above;
    u32 mine = 0;  // above in the lower half, tied in the upper
    each_key([&](u32 key, int) { mine += (key > threshold ? 1u : 0u) + (key == threshold ? 65536u : 0u); });
    mine = warp_sum(mine);
    if (lane == 0) s.count[warp] = mine;
    sync_block();
    int before = 0, tied_before = 0;
#pragma unroll
    for (int w = 0; w < WARPS; w++) {
        u32 x = w < warp ? s.count[w] : 0;
        before += x & 65535;
        tied_before += x >> 16;
    }
    u32 lanes_before = (1u << lane) - 1;
    each_key([&](u32 key, int base) {
        bool is_above = key > threshold, is_tied = key == threshold;
        u32 all_above = ballot(is_above), all_tied = allowed > 0 ? ballot(is_tied) : 0;
        int rank = tied_before + popcount(all_tied & lanes_before);
        if (is_above || (is_tied && rank < allowed)) {
            s.list[min_(before + popcount(all_above & lanes_before) + min_(rank, allowed), wanted - 1)] = base + lane;
#if RESIDUAL
            int at = base + lane - first;
            if (at >= 0 && at < num)
#pragma unroll
                for (int h = 0; h < GP; h++) s.mass[at * GP + h] = -infinity();
#endif
        }
        before += popcount(all_above);
        tied_before += popcount(all_tied);
    });
}

// ----------------------------------------------------------------------------------------------------- attention

struct Tokens {
    int limit;       // of the list: tokens that exist
    int covered;     // of these, leading ones that the state covers
    int start, stop; // this warp's steps of TOKENS
    int complete;    // units of complete pages in the list
    bool all;        // the list is all units there are
};

DEVICE int listed_unit(const Shared &s, const Row &row, const Tokens &n, int entry) {
    // Behind the complete units of the list stand the current page's.
    return n.all ? entry : entry < n.complete ? s.list[entry] : row.num_units + entry - n.complete;
}

// Ask for the tokens of a warp's `k`-th step, which are of one unit.
DEVICE void issue_step(const Shared &s, const Row &row, const Tokens &n, int k, int warp, int lane) {
    int t = (n.start + k) * TOKENS;
    int unit = listed_unit(s, row, n, t / UNIT);
    const u16 *from = page_at(row, row.pages[unit / UNITS_PER_PAGE]) + (unit % UNITS_PER_PAGE * UNIT + t % UNIT) * ROW;
    char *to = s.ring + warp * RING_BYTES + k % STEPS * TOKENS * STRIDE;
#pragma unroll
    for (int j = 0; j < TOKENS; j += STATE_ROWS_AT_ONCE) {
        int r = j + lane / STATE_LANES;
        copy_in(to + r * STRIDE + lane % STATE_LANES * 16, from + r * ROW + lane % STATE_LANES * 8);
    }
}

// One warp's partial result: numerators in its ring `[COLUMNS][PART_STRIDE]`, scalars in `s.warp [warp][SCALARS][GP]`.
DEVICE void attend(
    const Shared &s, const Row &row, const Params &p, const Tokens &n, bool reads, int rank, int warp, int lane) {
    char *ring = s.ring + warp * RING_BYTES;
    int matrix = lane / 8, r = lane % 8;
    int head = lane / 4 % GP;
    StateRead state;
    if (RESIDUAL && reads) read_state(state, s, row, rank, warp, lane);
    float top = -infinity(), sum = 0.0f, z = 0.0f;
    float out[D / 16][COLUMN_TILES][4];  // [dims, columns]
#pragma unroll
    for (int i = 0; i < D / 16; i++)
#pragma unroll
        for (int c = 0; c < COLUMN_TILES; c++)
#pragma unroll
            for (int j = 0; j < 4; j++) out[i][c][j] = 0.0f;
    for (int k = 0; n.start + k < n.stop; k++) {
        int first = (n.start + k) * TOKENS;
        bool subtract = RESIDUAL && reads && first < n.covered;
        char *rows = ring + k % STEPS * TOKENS * STRIDE;
        wait_copies<STEPS - 1>();
        sync_warp();
        if (first + TOKENS > n.limit) {  // whatever lies behind the last token, NaN too, must not reach a product
            for (int t = n.limit - first; t < TOKENS; t++)
                for (int i = lane; i < D / 4; i += 32) *(Pair *)(rows + t * STRIDE + 2 * D + i * 8) = {{0, 0}};
            sync_warp();
        }
        float logit[2][4] = {};  // [heads, tokens], 8 tokens each
#pragma unroll
        for (int i = 0; i < D / 16; i += 2) {
            u32 q[4];
            load_tiles(q, s.query + r * QUERY_STRIDE + i * 16 + matrix * 8);
#pragma unroll
            for (int t = 0; t < 2; t++) {
                u32 x[4];
                load_tiles(x, rows + (t * 8 + r) * STRIDE + i * 32 + matrix * 16);
                multiply(logit[t], q[0], 0, q[1], 0, x[0], x[1]);
                multiply(logit[t], q[2], 0, q[3], 0, x[2], x[3]);
            }
        }
        // A lane has head `lane / 4` of the tokens `lane % 4 * 2 ..`, which is just what the right side of W^T V wants.
        float best = top;
#pragma unroll
        for (int t = 0; t < 2; t++)
#pragma unroll
            for (int j = 0; j < 2; j++) {
                logit[t][j] *= p.scale;
                bool exists = first + t * 8 + lane % 4 * 2 + j < n.limit;
                if (!exists) logit[t][j] = -infinity();
                best = max_(best, logit[t][j]);
            }
        best = max_(best, shuffle_xor(best, 1));
        best = max_(best, shuffle_xor(best, 2));
        float decay = exp_(top - best);
        bool moved = best > top;
        top = best;
        float weight[2][2];
#pragma unroll
        for (int t = 0; t < 2; t++)
#pragma unroll
            for (int j = 0; j < 2; j++) weight[t][j] = exp_(logit[t][j] - best);
        sum = sum * decay + (weight[0][0] + weight[0][1]) + (weight[1][0] + weight[1][1]);
        if (subtract) z += (logit[0][0] + logit[0][1]) + (logit[1][0] + logit[1][1]);
        if (ballot(moved)) {
            // Columns of softmax weights are in the first tile.
            float factor[2];
#pragma unroll
            for (int j = 0; j < 2; j++) {
                int column = lane % 4 * 2 + j;
                factor[j] = shuffle(decay, column * 4);
                if (column >= GP) factor[j] = 1.0f;
            }
#pragma unroll
            for (int i = 0; i < D / 16; i++)
#pragma unroll
                for (int j = 0; j < 4; j++) out[i][0][j] *= factor[j % 2];
        }
        u32 b[COLUMN_TILES][2];
#pragma unroll
        for (int c = 0; c < COLUMN_TILES; c++) {
            int column = c * 8 + lane / 4;
            int kind = column / GP;
#pragma unroll
            for (int t = 0; t < 2; t++) {
                u32 x = 0;
                if (kind == 0) {
                    x = two(weight[t][0], weight[t][1]);
                } else if (RESIDUAL && subtract && column < COLUMNS) {
                    u32 upper = two(logit[t][0], logit[t][1]);
                    x = kind == 1 ? upper : kind == 2 ? two(logit[t][0] - low(upper), logit[t][1] - high(upper)) : two(1.0f, 1.0f);
                }
                b[c][t] = x;
            }
        }
#pragma unroll
        for (int i = 0; i < D / 16; i++) {
            u32 v[4];
            load_tiles_transposed(v, rows + (matrix / 2 * 8 + r) * STRIDE + 2 * D + i * 32 + matrix % 2 * 16);
#pragma unroll
            for (int c = 0; c < COLUMN_TILES; c++)
                if (c == 0 || subtract) multiply(out[i][c], v[0], v[1], v[2], v[3], b[c][0], b[c][1]);
        }
        sync_warp();  // all lanes have read the rows
        if (n.start + k + STEPS < n.stop) issue_step(s, row, n, k + STEPS, warp, lane);
        close_copies();
    }
#pragma unroll
    for (int other = 1; other < 4; other *= 2) {
        sum += shuffle_xor(sum, other);
        z += shuffle_xor(z, other);
    }
    float *part = (float *)ring;
#pragma unroll
    for (int i = 0; i < D / 16; i++)
#pragma unroll
        for (int c = 0; c < COLUMN_TILES; c++)
#pragma unroll
            for (int j = 0; j < 4; j++)
                part[(c * 8 + lane % 4 * 2 + j % 2) * PART_STRIDE + i * 16 + j / 2 * 8 + lane / 4] = out[i][c][j];
    if (RESIDUAL && reads) {  // the rest: less what the state has
#pragma unroll
        for (int h = 0; h < GP; h++)
            if (head == h) z -= state.z[h];
        sync_warp();
        if (lane < D / 4) {
#pragma unroll
            for (int h = 0; h <= GP; h++) {
                Four *to = (Four *)(part + (h < GP ? GP + h : 3 * GP) * PART_STRIDE + lane * 4);
                Four x = *to;
#pragma unroll
                for (int j = 0; j < 4; j++) x.x[j] -= h < GP ? state.s[h % GP][j] : state.v[j];
                *to = x;
            }
        }
    }
    if (lane % 4 == 0 && lane / 4 < GP) {
        s.warp[warp * SCALARS * GP + head] = top;
        s.warp[(warp * SCALARS + 1) * GP + head] = sum;
        s.warp[(warp * SCALARS + 2) * GP + head] = z;
    }
}

// Mass of this block's units that were not selected, from the normaliser of the scores, which are no smaller.
DEVICE void mass_of_rest(const Shared &s, int num, int warp, int lane) {
    float anchor = s.lse[lane % GP], sum = 0.0f;
    for (int i = warp * 32 + lane; i < num * GP; i += THREADS) sum += exp_(s.mass[i] - anchor);
#pragma unroll
    for (int other = GP; other < 32; other *= 2) sum += shuffle_xor(sum, other);
    if (lane < GP) s.warp[(warp * SCALARS + 3) * GP + lane] = sum;
}

// The warps' partial results become this block's.
DEVICE void merge_warps(const Shared &s, bool reads, int tid) {
    sync_block();
    for (int e = tid; e < PART_ROWS * D / 4; e += THREADS) {
        int r = e / (D / 4), column = e % (D / 4) * 4;
        float sum[4] = {}, top = -infinity();
        if (r < GP)
#pragma unroll
            for (int w = 0; w < WARPS; w++) top = max_(top, s.warp[w * SCALARS * GP + r]);
#pragma unroll
        for (int w = 0; w < WARPS; w++) {
            const float *part = (const float *)(s.ring + w * RING_BYTES) + column;
            Four x = *(const Four *)(part + (r < 2 * GP ? r : 3 * GP) * PART_STRIDE);
            float weight = r < GP ? exp_(s.warp[w * SCALARS * GP + r] - finite_or_0(top)) : 1.0f;
            if (r >= GP && r < 2 * GP) {
                Four more = *(const Four *)(part + (r + GP) * PART_STRIDE);
#pragma unroll
                for (int j = 0; j < 4; j++) x.x[j] += more.x[j];
            }
#pragma unroll
            for (int j = 0; j < 4; j++) sum[j] += weight * x.x[j];
        }
        *(Four *)(s.part + e * 4) = {{sum[0], sum[1], sum[2], sum[3]}};
    }
    if (tid < GP) {
        float top = -infinity(), sum = 0.0f, z = 0.0f, mass = 0.0f;
#pragma unroll
        for (int w = 0; w < WARPS; w++) top = max_(top, s.warp[w * SCALARS * GP + tid]);
#pragma unroll
        for (int w = 0; w < WARPS; w++) {
            const float *x = s.warp + w * SCALARS * GP + tid;
            sum += x[GP] * exp_(x[0] - finite_or_0(top));
            z += x[2 * GP];
            if (RESIDUAL && reads) mass += x[3 * GP];
        }
        s.mine[tid] = top;
        s.mine[GP + tid] = sum;
        s.mine[2 * GP + tid] = z;
        s.mine[3 * GP + tid] = mass;
    }
    sync_block();
}

// Merge the blocks of the cluster, combine, and write this block's slice of the output.
DEVICE void merge_blocks(
    const Shared &s, const Row &row, const Params &p, i64 token, int num_rest, int rank, int tid) {
    float *weight = s.final_;                   // [MAX_CLUSTER][GP]: of a block's exact part
    float *share = s.final_ + MAX_CLUSTER * GP; // [GP]: of the tail in the output
    float *mean_qk = share + GP;                // [GP]
    // The residual's sums are those of the selected tokens less those of the state.
    float per_token = num_rest > 0 ? -1.0f / (float)num_rest : 0.0f;
    constexpr int LANES = 8, MOST = 2;  // that read an element together, of `MOST` blocks each at most
    int lanes = min_(BLOCKS, LANES);
    int slice = ceil_div(GROUP * D, BLOCKS);
    int lane = tid % lanes;
    if (tid < max_(32, MAX_CLUSTER * GP)) {
        int h = tid / MAX_CLUSTER % GP, b = tid % MAX_CLUSTER;  // a lane a block
        const float *x = s.scalars + b * SCALARS * GP + h;
        bool exists = b < BLOCKS;
        float mine = exists ? x[0] : -infinity();
        float top = mine;
#pragma unroll
        for (int other = 1; other < MAX_CLUSTER; other *= 2) top = max_(top, shuffle_xor(top, other));
        float decay = exp_(mine - top);
        float sum = exists ? decay * x[GP] : 0.0f, z = exists ? x[2 * GP] : 0.0f, mass = exists ? x[3 * GP] : 0.0f;
#pragma unroll
        for (int other = 1; other < MAX_CLUSTER; other *= 2) {
            sum += shuffle_xor(sum, other);
            z += shuffle_xor(z, other);
            mass += shuffle_xor(mass, other);
        }
        weight[b * GP + h] = decay / sum;
        float gain = s.gain[h], tail = 0.0f;
        if (num_rest > 0 && gain > 0.0f && mass > 0.0f)
            tail = 1.0f / (1.0f + exp_(top - s.lse[h] + log_(sum) - log_(mass) - log_(gain)));
        share[h] = tail;
        mean_qk[h] = z * per_token;
    }
    sync_block();
    for (int e = tid / lanes; e < slice; e += THREADS / lanes) {
        int at = rank * slice + e;
        bool exists = at < GROUP * D;
        int h = exists ? at / D : 0, column = at % D;
        float exact = 0.0f, rest = 0.0f, v = 0.0f;
#pragma unroll
        for (int i = 0; i < MOST; i++) {
            int b = lane + i * LANES;
            if (exists && b < BLOCKS) {
                const float *part = of_block(s.part, b);
                exact += weight[b * GP + h] * part[h * D + column];
                if (RESIDUAL && num_rest > 0) {
                    rest += part[(GP + h) * D + column];
                    v += part[2 * GP * D + column];
                }
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

// q, and q^2 in two parts of the cache dtype: normalised to its largest element, so that fp16 holds it. Warp `w` has head
// `w % GP`.
DEVICE void load_query(const Shared &s, const Params &p, i64 token, int head, int warp, int lane) {
    int h = warp % GP;
    u16 *q = s.query + warp * QUERY_STRIDE;
    const u16 *from = p.query + token * p.query_token_stride + (head * GROUP + h) * p.query_head_stride;
    u16 raw[D / 32];
    float peak = 0.0f;
#pragma unroll
    for (int i = 0; i < D / 32; i++) {
        raw[i] = h < GROUP ? from[i * 32 + lane] : 0;
        float x = element(raw[i]) * p.scale;
        peak = max_(peak, x * x);
    }
#pragma unroll
    for (int other = 1; other < 32; other *= 2) peak = max_(peak, shuffle_xor(peak, other));
    peak = max_(peak, 1e-30f);
#pragma unroll
    for (int i = 0; i < D / 32; i++) {
        int at = i * 32 + lane;
        float x = element(raw[i]), scaled = x * p.scale;
        q[at] = raw[i];
#if SELECTOR == QUEST
        q[8 * QUERY_STRIDE + at] = x < 0.0f ? raw[i] : 0;
        q[16 * QUERY_STRIDE + at] = x > 0.0f ? raw[i] : 0;
#else
        float square = scaled * scaled * (1024.0f / peak);
        u16 upper = rounded(square);
        q[8 * QUERY_STRIDE + at] = upper;
        q[16 * QUERY_STRIDE + at] = rounded(square - element(upper));
#endif
        if (warp < GP) s.scaled[h * D + at] = scaled;
    }
    if (warp < GP && lane == 0) {
        s.restore[h] = peak * (1.0f / 1024.0f);
        s.gain[h] = h < GROUP ? p.gain[head * GROUP + h] : 0.0f;
    }
}

// Grid (blocks of a cluster, G, rows), clusters of (gridDim.x, 1, 1).
KERNEL spla_fused_decode(KERNEL_PARAMS) {
    int tid = thread_id(), warp = tid / 32, lane = tid % 32;
    int rank = block_x(), head = block_y();
    Shared s = carve(shared_memory, p);
    grid_launch();
    s.bins[tid] = 0;

    // Lengths and tables are the step's and stand long before the launch that is waited for.
    i64 row_index = block_z();
    int seq_len = p.seq_lens[row_index];
    i64 token = p.query_start_loc[row_index];
    bool exists = seq_len > 0 && p.query_start_loc[row_index + 1] > token;
    if (!exists) {
        // Padding. Its output row is ours to clear only behind the tokens of all real rows.
        grid_wait();
        if (rank == 0 && row_index >= p.query_start_loc[p.num_rows])
            for (int e = tid; e < GROUP * D; e += THREADS)
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
    int num_current = row.position % PAGE / UNIT + 1;  // units of the current page, the last one partly filled
    Tokens n;
    n.all = row.num_units + num_current <= p.budget;
    n.complete = n.all ? row.num_units : p.budget - num_current;
    bool reads = !n.all;  // some units are left out
    int share = share_of(row.num_units);
    int first = min_(rank * share, row.num_units);
    int num = min_(share, row.num_units - first);
    int tiles = reads ? tiles_of(num, warp) : 0;
    // A lane a unit of the first tiles.
    constexpr int ASKING = STAGES * TILE / 32 > 0 ? STAGES * TILE / 32 : 1;
    int ids[ASKING];
#pragma unroll
    for (int i = 0; i < ASKING; i++) {
        int k = i * 4 + lane / TILE;
        ids[i] = k < STAGES && k < tiles ? row.pages[unit_of(first, num, warp, k, lane % TILE) / UNITS_PER_PAGE] : 0;
    }
    grid_wait();
#pragma unroll
    for (int k = 0; k < STAGES; k++) {
        if (k < tiles) issue_tile(s, row, first, num, k, ids[k / 4], k % 4 * TILE, warp, lane);
        close_copies();
    }
    Trust trust;
    if (RESIDUAL && target > 0) {
        if (warp == WARPS - 1) trust = ask_trust(row, target, lane);
        if (reads) prefetch_state(row, rank, tid);
    }
    load_query(s, p, token, head, warp, lane);
    sync_block();
    if (tiles > 0) score_units(s, row, p, first, num, warp, lane);
    int covered = target;
    if (RESIDUAL && target > 0 && warp == WARPS - 1) {
        covered = trusted_pages(trust, row, target, lane);
        if (lane == 0) s.flags[0] = covered;
    }
    sync_block();
    if (RESIDUAL && target > 0) {
        covered = s.flags[0];
        if (covered < target) fold(s, row, rank, covered, target, warp, lane);
    }
    if (reads) share_norms(s, num, rank, tid);
    sync_cluster();
    // All blocks have read the headers.
    if (RESIDUAL && warp == 0 && rank == 0 && covered < target) write_headers(row, target, lane);
    if (reads) {
        share_keys(s, row, p, first, num, rank, tid);
        sync_cluster();
        int leading = min_(p.first, row.num_units);
        int trailing = row.num_units - max_(row.position / UNIT - p.last + 1, leading);
        select(s, row.num_units, n.complete, n.complete - leading - max_(trailing, 0), first, num, tid);
        sync_block();
    }
    n.covered = n.complete * UNIT;
    n.limit = (n.complete + num_current - 1) * UNIT + row.position % UNIT + 1;
    int steps = ceil_div(n.limit, TOKENS);
    int per_warp = ceil_div(steps, BLOCKS * WARPS);
    n.start = min_((rank * WARPS + warp) * per_warp, steps);
    n.stop = min_(n.start + per_warp, steps);
#pragma unroll
    for (int k = 0; k < STEPS; k++) {
        if (n.start + k < n.stop) issue_step(s, row, n, k, warp, lane);
        close_copies();
    }
    if (RESIDUAL && reads) mass_of_rest(s, num, warp, lane);
    attend(s, row, p, n, reads, rank, warp, lane);
    merge_warps(s, reads, tid);
    for (int i = tid; i < BLOCKS * SCALARS * GP; i += THREADS)
        *of_block(s.scalars + rank * SCALARS * GP + i % (SCALARS * GP), i / (SCALARS * GP)) = s.mine[i % (SCALARS * GP)];
    sync_cluster();
    merge_blocks(s, row, p, token, reads ? (row.num_units - n.complete) * UNIT : 0, rank, tid);
    if (rank == BLOCKS - 1) {
        int entries = n.complete + num_current;
        i64 pair = token * p.num_kv_heads + head;
        for (int i = tid; i < min_(entries, p.table_width); i += THREADS) {
            int unit = listed_unit(s, row, n, i);
            int page = within_cache(row, row.pages[unit / UNITS_PER_PAGE]);
            p.table[pair * p.table_width + i] = (page * p.num_kv_heads + head) * UNITS_PER_PAGE + unit % UNITS_PER_PAGE;
        }
        if (tid == 0) p.count[pair] = entries;
    }
    sync_cluster();  // nobody leaves while others read its shared memory
}

}  // namespace spla
