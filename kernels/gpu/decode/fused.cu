// SPLA decode of one layer in one launch: a thread block cluster a (row, kv head). For long rows in small batches a launch
// ahead of it makes the scores, on all multiprocessors (SCORED, `spla_score_units` at the end of this file).
//
// The launches of `gpu/decode/steps` wait for each other through device memory, and at small batches that is all they do.
// Here a cluster of up to 16 thread blocks scores its pages, agrees on a selection, attends and merges through
// distributed shared memory. `gpu/decode/fused.py` compiles (NVRTC) and launches it, and says what it covers; the plain
// reference is `reference.spla_token`, the plain peer on a GPU `DecodeSteps`.
//
// Steps of a thread block (docs/design.md, 1 to 6, for what is computed):
//   1. score the units (selection blocks) of the block's share, or fetch the scores that were made ahead; meanwhile one warp
//      asks whether the recurrent state is valid for this sequence. Where it lacks pages, fold them in
//   2. normalisers of all heads are exchanged, then histograms of the group scores; with them every block knows which of its
//      units are selected but for those near the threshold, and sends both kinds to all blocks, which rank the latter.
//      With two levels (FINE) these are the candidates: their fine blocks are scored by the sketches of their keys, dealt out to
//      the blocks anew, and chosen among in the same way
//   3. each block attends to its share of the selected tokens, and reads its rows of the state
//   4. partial results are merged over warps; each block gets the columns of the output that are its own from all others
//
// Statistics, keys and values come by asynchronous copies into a ring that a warp owns: no warp waits for another.
// What is read is a dense row of `2 D` elements in all cases: mean and variance of a unit, key and value of a token.
// Statistics in fp8 become float16 in registers, and meet the query in it.
//
// Floor, bytes a (row, kv head): `2 D` elements, or bytes, a unit and 4 bytes a page; `2 D` elements a selected token;
// `(D + 2) D` float32 of state; with two levels `9 D / 16` bytes a token of the candidates, and their mean again. FLOP:
// `4 GROUP D` a unit, `8 GROUP D` a selected token, `2 GROUP D` a token of the candidates, on tensor cores that are mostly empty.
//
// Compiled with: D, GROUP, PAGE, UNIT (tokens a selection block), FP16 (0: bf16), FP8 (statistics are bytes), SELECTOR, RESIDUAL (0 none,
// 1 regression), NUM_BLOCKS, BODY (state blocks a request, body rows a block), STAMP_WORD, MAGIC, LOG_UNIT (log of UNIT),
// FINE (tokens a fine block: 16, or 0 for one level), SKETCH_AT, SKETCH_SCALES (bytes from a page's first token to the sketch of its
// keys, from there to its scales), BLOCKS (of a cluster), TABLE (1: the row's block table fits into shared memory, too), SCORED (1: scores are made ahead).

namespace spla {

typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;

#define TAYLOR2 1
#define CUMULANT2 2
#define REM 3
#define QUEST 4

constexpr int max_of(int a, int b) { return a > b ? a : b; }
constexpr int next_power(int x) { return x <= 1 ? 1 : 2 * next_power((x + 1) / 2); }

constexpr int GP = next_power(GROUP);      // heads of a group, padded
constexpr int WARPS = 8;
constexpr int THREADS = WARPS * 32;
constexpr int ROW = 2 * D;                 // elements of a row
constexpr int ROW_BYTES = 2 * ROW;
constexpr int UNITS_PER_PAGE = PAGE / UNIT;
constexpr int FINE_PER_UNIT = FINE ? UNIT / (FINE ? FINE : 1) : 1;
constexpr int ATTENDED = UNIT / FINE_PER_UNIT;  // tokens of what is attended to: a fine block, or a unit where there is one level
constexpr int ATTENDED_PER_PAGE = PAGE / ATTENDED;
constexpr int STRIDE = ROW_BYTES + 16;     // bytes between rows in shared memory: eight rows lie in different banks
constexpr int TILE = 16;                   // rows of a matrix tile
constexpr int RING_ROWS = 4096 / D;                      // rows of the cache dtype that a warp has in flight
constexpr int STATISTIC_BYTES = FP8 ? ROW : ROW_BYTES;   // of a unit
constexpr int STATISTIC_STRIDE = STATISTIC_BYTES + 16;
constexpr int STAGES = (FP8 ? 2 : 1) * RING_ROWS / TILE; // scoring goes by 16 units
constexpr int TILES = FP8 ? 2 : 1;                       // tiles a warp scores at once
constexpr int TOKENS = TILE;                             // attention by 16 tokens
constexpr int STEPS = RING_ROWS / TOKENS;
constexpr int RING_BYTES = max_of(RING_ROWS * STRIDE, STAGES * TILE * STATISTIC_STRIDE);  // a warp; later its partial result
constexpr int QUERY_STRIDE = D + 8;                      // elements
constexpr bool OWN_QUERY = FP8 && !FP16;                 // statistics meet a query of another type than keys do
constexpr int QUERIES = OWN_QUERY ? 4 : 3;
// Columns of the weights W in W^T V: softmax weights, feature weights in two parts, ones; for each head, and one.
constexpr int COLUMNS = RESIDUAL ? 3 * GP + 1 : GP;
constexpr int COLUMN_TILES = (COLUMNS + 7) / 8;
constexpr int PART_STRIDE = D + 4;                       // floats
constexpr int PART_ROWS = RESIDUAL ? 2 * GP + 1 : GP;    // exact, residual of each head; sum of values
constexpr int SCALARS = 4;                               // a head: maximum, sum, phi(q) . z, mass of the rest
constexpr int MAX_CLUSTER = 16;
constexpr int BINS = 256;                   // of keys; those of scores are 32 an octave, from 2^-3 on
constexpr int BIN_SHIFT = 18;
constexpr u32 FIRST_BIN = (127 - 3) << 5;
constexpr u32 END_OF_KEYS = 0x80000000u;
constexpr u32 FORCED = 0xffffffffu;         // key of a unit that is selected anyway
constexpr int BIN_WORDS = BINS / 2;         // two counts a word: there are fewer than 65,536 units
#ifndef MOST_MEMBERS
#define MOST_MEMBERS 64
#endif
constexpr int MEMBERS = MOST_MEMBERS;       // of the bin of the threshold, that are ranked against each other; tests set less
constexpr int MEMBERS_OF_LANE = (MEMBERS + 31) / 32;
constexpr int ROWS_OF_BLOCK = (D + BLOCKS - 1) / BLOCKS; // of the state, at most
constexpr int SLICE = (D / 4 + BLOCKS - 1) / BLOCKS;     // columns of the output that a block has at most, by fours
constexpr int STATE_LANES = D / 4;                       // lanes of a row of the state, or of a value: 4 elements each
constexpr int STATE_ROWS_AT_ONCE = 32 / STATE_LANES;
constexpr int STATISTIC_LANES = STATISTIC_BYTES / 16;    // lanes that copy a unit's statistics
constexpr float LOG2E = 1.4426950408889634f;
constexpr float LN2 = 0.6931471805599453f;

static_assert(COLUMN_TILES * 8 * PART_STRIDE * 4 <= RING_BYTES, "a warp's partial result fits into its ring");

// The sketch of a unit: of each token `KEY_CHUNKS` pieces of 16 bytes, 32 codes each, and as many scales. The unit's mean is read again.
constexpr int KEY_CHUNKS = D / 32;
constexpr int CODE_BYTES = UNIT * D / 2, SCALE_BYTES = UNIT * D / 16, MEAN_BYTES = STATISTIC_BYTES / 2;
constexpr int SKETCH_STRIDE = CODE_BYTES + SCALE_BYTES + MEAN_BYTES;
constexpr int HEAD_TILES = (GP + 3) / 4;                 // of q in bytes: four heads are eight columns
constexpr int BYTES_STRIDE = D + 32;
constexpr int INTEGER = 0x4b400000;                      // to this as a float, 3 * 2^22, a small integer adds itself
constexpr float INTEGER_ZERO = 12582912.0f;
constexpr int SKETCHES = RING_BYTES / SKETCH_STRIDE;     // that a warp has in flight
static_assert(!FINE || (FINE == TILE && SKETCHES > 0), "a fine block is a tile, and its unit's sketch fits into a warp's ring");

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
    int *candidates;         // [tokens, G, max_candidates]: as `table`, of units, where FINE
    int *candidate_count;    // [tokens, G]
    float *scores, *mass;    // [rows, G, max_units, GP]: what `spla_score_units` writes, where SCORED; for TAYLOR2 the same array
    i64 query_token_stride, query_head_stride;
    i64 page_stride, head_stride;              // elements
    i64 state_block_stride, state_head_stride; // float32
    i64 output_token_stride, output_head_stride;
    i64 block_table_stride, state_table_stride;
    int num_rows, num_kv_heads, last_page, max_units, table_width;
    int budget, whole, first, last, max_candidates;  // units; a row of up to `whole` is attended to whole
    int early;                // 1: the launch before this one writes no statistics but those of pages that it completes
    float scale, residual_scale;
};

#ifndef SPLA_EMULATE  // ------------------------------------------------------------- the hardware, in one place each

#define DEVICE static __device__ __forceinline__
extern __shared__ __align__(128) char shared_memory[];

DEVICE int thread_id() { return threadIdx.x; }
DEVICE int block_x() { return blockIdx.x; }
DEVICE int block_y() { return blockIdx.y; }
DEVICE int block_z() { return blockIdx.z; }
DEVICE int block_count() { return gridDim.x; }
DEVICE u32 shared_address(const void *p) { return (u32)__cvta_generic_to_shared(p); }
DEVICE float shuffle_xor(float x, int mask) { return __shfl_xor_sync(0xffffffffu, x, mask); }
DEVICE float shuffle(float x, int lane) { return __shfl_sync(0xffffffffu, x, lane); }
DEVICE int shuffle(int x, int lane) { return __shfl_sync(0xffffffffu, x, lane); }
DEVICE u32 ballot(bool x) { return __ballot_sync(0xffffffffu, x); }
DEVICE u32 warp_sum(u32 x) { return __reduce_add_sync(0xffffffffu, x); }
DEVICE u32 shuffle_up(u32 x, int by) { return __shfl_up_sync(0xffffffffu, x, by); }
DEVICE int popcount(u32 x) { return __popc(x); }
DEVICE int leading_zeros(u32 x) { return __clz(x); }
DEVICE u32 add_to(u32 *p, u32 x) { return atomicAdd(p, x); }
// The same pointer, whose parts the compiler does not know and so adds up once.
DEVICE const char *opaque(const char *p) { asm("" : "+l"(p)); return p; }
DEVICE void prefetch(const void *p) { asm volatile("prefetch.global.L2 [%0];" ::"l"((u64)p)); }
DEVICE void sync_warp() { __syncwarp(); }
DEVICE void sync_block() { __syncthreads(); }
DEVICE void arrive_at_cluster() { asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory"); }
DEVICE void wait_for_cluster() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }
// The same place in the shared memory of another block of the cluster.
template <typename T> DEVICE T *of_block(T *p, int rank) {
    u64 out;
    asm("mapa.u64 %0, %1, %2;" : "=l"(out) : "l"((u64)p), "r"(rank));
    return (T *)out;
}
DEVICE void grid_wait() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
DEVICE void grid_launch() { asm volatile("griddepcontrol.launch_dependents;"); }
DEVICE float exp2_(float x) { float y; asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x)); return y; }
DEVICE float log2_(float x) { float y; asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x)); return y; }
DEVICE float reciprocal(float x) { float y; asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x)); return y; }
DEVICE float larger(float a, float b) { return fmaxf(a, b); }
DEVICE float sqrt_(float x) { float y; asm("sqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x)); return y; }
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
// An 8x8 matrix of 16-bit elements, a lane two neighbours of row `l / 4`, transposed.
DEVICE u32 transposed(u32 x) {
    u32 y;
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y) : "r"(x));
    return y;
}
#if FP16
#define MMA_TYPE "f16"
#else
#define MMA_TYPE "bf16"
#endif
// c [16, 8] += a [16, 16] b [16, 8]: m16n8k16.
#define MULTIPLY(NAME, TYPE) \
    DEVICE void NAME(float (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) { \
        asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." TYPE "." TYPE ".f32 " \
                     "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};" \
                     : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) \
                     : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1)); \
    }
MULTIPLY(multiply, MMA_TYPE)
MULTIPLY(multiply_half, "f16")  // whatever the cache dtype
// d [16, 8] = a [16, 32] b [32, 8] + c, unsigned and signed bytes: m16n8k32.
DEVICE void multiply_bytes(int (&d)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1, const int (&c)[4]) {
    asm volatile("mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%10, %11, %12, %13};"
                 : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
                 : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1), "r"(c[0]), "r"(c[1]), "r"(c[2]), "r"(c[3]));
}
// The two lower, or upper, of four e4m3 bytes as float16.
DEVICE u32 e4m3_lower(u32 x) {
    u32 y;
    asm("{ .reg .b16 l, h; mov.b32 {l, h}, %1; cvt.rn.f16x2.e4m3x2 %0, l; }" : "=r"(y) : "r"(x));
    return y;
}
DEVICE u32 e4m3_upper(u32 x) {
    u32 y;
    asm("{ .reg .b16 l, h; mov.b32 {l, h}, %1; cvt.rn.f16x2.e4m3x2 %0, h; }" : "=r"(y) : "r"(x));
    return y;
}
// Bytes `b0 b1` and `b2 b3` of a word in the upper halves of two 16-bit numbers.
DEVICE u32 spread_lower(u32 x) { return __byte_perm(x, 0, 0x1404); }
DEVICE u32 spread_upper(u32 x) { return __byte_perm(x, 0, 0x3424); }

// 16 bytes a lane, in groups that a lane closes and waits for itself: the bulk copy engine takes far fewer rows of 512 bytes a second.
DEVICE void copy_in(void *to, const void *from) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(to)), "l"((u64)from) : "memory");
}
DEVICE void copy_word(void *to, const void *from) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(shared_address(to)), "l"((u64)from) : "memory");
}
// 16 bytes that are read once, to registers.
DEVICE void load_once(u32 (&x)[4], const void *from) {
    asm volatile("ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3]) : "l"((u64)from) : "memory");
}
DEVICE void close_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// All groups but the last `N` have arrived.
template <int N> DEVICE void wait_copies() { asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory"); }

#define KERNEL(threads, a_multiprocessor) extern "C" __global__ void __launch_bounds__(threads, a_multiprocessor)
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
DEVICE u32 max_(u32 a, u32 b) { return a > b ? a : b; }
DEVICE int ceil_div(int a, int b) { return (a + b - 1) / b; }
DEVICE float finite_or_0(float x) { return x == -infinity() ? 0.0f : x; }

DEVICE void sync_cluster() {
    arrive_at_cluster();
    wait_for_cluster();
}

DEVICE u32 two(float a, float b) { return (u32)rounded(a) | (u32)rounded(b) << 16; }

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

// Of the products of 16 units (rows) with the columns of `q` and of `q^2` a lane has two heads of the units `lane / 4` and
// `lane / 4 + 8`; with up to four heads, whose q^2 has its low part in the columns 4 to 7, of one of the two.
constexpr int HALVES = GP > 4 ? 2 : 1;
DEVICE int half_of(int lane) { return GP > 4 ? 0 : lane % 4 / 2; }
DEVICE int head_of(int lane) { return (GP > 4 ? lane % 4 : lane % 2) * 2; }

// Score, and mass, of a lane's `j`-th head and `i`-th unit.
struct Score {
    float score, mass;
};
DEVICE Score score_of(const float (&linear)[4], const float (&second)[4], int half, int i, int j, float restore, float scale) {
    float one, two;
    if constexpr (GP > 4) {
        one = linear[i * 2 + j];
        two = second[i * 2 + j];
    } else {  // the other part of q^2 is two lanes away, which has the other half of the units
        one = half ? linear[2 + j] : linear[j];
        two = half ? second[2 + j] : second[j];
        if constexpr (SELECTOR != QUEST) two += shuffle_xor(half ? second[j] : second[2 + j], 2);
    }
#if SELECTOR == QUEST
    return {(one + two) * scale, 0.0f};
#else
    float base = LOG_UNIT + one * scale;
    float s2 = max_(two * restore, 0.0f);
    return {base + second_order(s2), base + log_(1.0f + 0.5f * s2)};
#endif
}

// An element of q in the forms in which it meets statistics: as it is; its square in two parts, of which the first is the
// rounded one (for quest, its negative and positive part instead). In float16 squares are normalised to the largest, so that
// float16 holds them.
struct Forms {
    u16 own, upper, lower;
};
DEVICE Forms forms_of(u16 raw, float scale, float to_1024) {
    float x = element(raw);
    Forms out;
    out.own = OWN_QUERY ? float_to_half(max_(-max_(-x, -65504.0f), -65504.0f)) : raw;
#if SELECTOR == QUEST
    out.upper = x < 0.0f ? out.own : 0;
    out.lower = x > 0.0f ? out.own : 0;
#else
    float square = x * scale * (x * scale) * to_1024;
    out.upper = FP8 ? float_to_half(square) : rounded(square);
    square -= FP8 ? half_to_float(out.upper) : element(out.upper);
    out.lower = FP8 ? float_to_half(square) : rounded(square);
#endif
    return out;
}

// Shared memory of a block.
struct Shared {
    char *ring;       // [WARPS][RING_BYTES]
    u32 *keys;        // [share]: of this block's units: bits of a bound less the group score, so that the least is the best
    float *score;     // [share][GP]: of this block's units; then of the fine blocks of all candidates
    float *mass;      // [share][GP], where there is a residual
    int *list;        // [budget]: selected blocks, where some are left out; before, the candidates
    int *candidates;  // [max_candidates]: units, in any order, where FINE
    u32 *fine_keys;   // as `keys`, of the fine blocks of all candidates, behind their scores; `keys` then counts how many of its fine
                      // blocks a unit has in the list
    u16 *query;       // [QUERIES][8][QUERY_STRIDE]: q; q^2 in two parts, normalised; q as the statistics meet it where that
                      // is another; row `r` is head `r % GP`
    char *bytes;      // [HEAD_TILES * 8][BYTES_STRIDE]: q in 16 bits, as codes meet it: the upper and the lower bytes of a head are
                      // neighbouring columns; of eight channels first the even ones, then the odd ones
    float *step;      // [GP]: what logits by these count in
    float *scaled;    // [GP][D]: q times the softmax scale
    float *restore;   // [GP]: what undoes the normalisation of q^2
    float *part;      // [BLOCKS][PART_ROWS][SLICE * 4]: partial results of all blocks, this block's columns of them; shares
                      // the scores' memory where it can
    float *gain;      // [GP]
    float *norms;     // [BLOCKS][2 GP]: maxima and sums of the blocks' scores
    u32 *bins;        // [BIN_WORDS]: units a bin, forced ones left out, of this block
    u32 *all_bins;    // [2][BLOCKS][BIN_WORDS]: of all blocks, in turns
    u64 *members;     // [MEMBERS]: key and number of the units in the bin of the threshold
    float *lse;       // [GP], of all scores of units
    float *scalars;   // [BLOCKS][SCALARS][GP]: of all blocks
    float *warp;      // [WARPS][SCALARS][GP]
    float *final_;    // [MAX_CLUSTER + 4][GP]
    u32 *count;       // [WARPS]
    int *flags;       // [4]
    int *table;       // [max_pages]: the row's block table
};

// Units of a block's share.
DEVICE int share_of(int units) { return (ceil_div(units, BLOCKS) + 3) / 4 * 4; }

// `kernels/gpu/decode/fused.py: shared_bytes` adds up the same.
DEVICE Shared carve(char *base, const Params &p) {
    Shared s;
    char *at = base;
    int share = share_of(p.max_units), fine = FINE ? p.max_candidates * FINE_PER_UNIT : 0;
    int scores = max_(share * GP, fine * (GP + 1));
#define TAKE(field, type, n) s.field = (type *)at; at += ((n) * sizeof(type) + 15) / 16 * 16;
    TAKE(ring, char, WARPS * RING_BYTES)
    TAKE(keys, u32, share)
    TAKE(score, float, scores)
    s.fine_keys = (u32 *)s.score + fine * GP;
    // No block needs the scores of single heads any more when partial results are sent.
    s.part = s.score;
    if (scores < BLOCKS * PART_ROWS * SLICE * 4) {
        TAKE(part, float, BLOCKS * PART_ROWS * SLICE * 4)
    }
    TAKE(mass, float, RESIDUAL ? share * GP : 0)
    TAKE(list, int, max_(p.budget * FINE_PER_UNIT, FINE ? p.max_candidates : 0))
    TAKE(candidates, int, FINE ? p.max_candidates : 0)
    TAKE(query, u16, QUERIES * 8 * QUERY_STRIDE)
    TAKE(bytes, char, FINE ? HEAD_TILES * 8 * BYTES_STRIDE : 0)
    TAKE(step, float, FINE ? GP : 0)
    TAKE(scaled, float, GP * D)
    TAKE(restore, float, GP)
    TAKE(gain, float, GP)
    TAKE(norms, float, BLOCKS * 2 * GP)
    TAKE(bins, u32, BIN_WORDS)
    TAKE(all_bins, u32, 2 * BLOCKS * BIN_WORDS)
    TAKE(members, u64, MEMBERS)
    TAKE(lse, float, GP)
    TAKE(scalars, float, BLOCKS * SCALARS * GP)
    TAKE(warp, float, WARPS * SCALARS * GP)
    TAKE(final_, float, (MAX_CLUSTER + 4) * GP)
    TAKE(count, u32, WARPS)
    TAKE(flags, int, 4)
    TAKE(table, int, TABLE ? p.max_units / UNITS_PER_PAGE : 0)
#undef TAKE
    return s;
}

struct Row {
    const int *pages;       // block table
    int blocks[NUM_BLOCKS]; // state blocks
    const u16 *kv;          // pages of this kv head
    float *state;           // state blocks of this kv head
    int position;           // of the query token
    int num_units;          // of complete pages
    int head;
    i64 page_stride, state_block_stride;
    u32 page_step;          // page_stride in `STEP` bytes
    int last_page;
};

// Page ids come from the engine; one that no page has must not lead out of the cache.
DEVICE int within_cache(const Row &row, int id) { return min_(max_(id, 0), row.last_page); }

DEVICE const u16 *page_at(const Row &row, int id) {
    return row.kv + (i64)within_cache(row, id) * row.page_stride;
}

// Of a page by its number in the sequence.
DEVICE int page_id(const Shared &s, const Row &row, int index) {
    return within_cache(row, (TABLE ? s.table : row.pages)[index]);
}

// Where the statistics of a unit stand, in `STEP` bytes from `row.kv` on, so that one register has it.
constexpr int STEP = 64;
DEVICE u32 place_of(const Row &row, int id, int unit) {
    return (u32)id * row.page_step + (PAGE * ROW_BYTES + unit % UNITS_PER_PAGE * STATISTIC_BYTES) / STEP;
}

DEVICE float *state_block(const Row &row, int block) {
    i64 id = row.blocks[0];
#pragma unroll
    for (int b = 1; b < NUM_BLOCKS; b++)
        if (block == b) id = row.blocks[b];
    return row.state + id * row.state_block_stride;
}

DEVICE float *state_row(const Row &row, int t) { return state_block(row, t / BODY) + (1 + t % BODY) * D; }

// Rows of the state, and fours of columns of the output, are dealt out to the blocks of the cluster.
DEVICE int first_of(int count, int rank) { return rank * count / BLOCKS; }

// ------------------------------------------------------------------------------------------------ recurrent state

// What decides whether a stored state is trusted, on its way; one warp, a quarter of it a state block. Which page's stamp
// is needed the header says, but it is nearly always one of two, which are asked for together with the headers.
struct Trust {
    int found[(NUM_BLOCKS + 3) / 4];
    int last, before;
};

// `last` and `before` are the ids of the last two complete pages.
DEVICE Trust ask_trust(const Row &row, int last, int before, int lane) {
    Trust t;
    int word = lane & 7;
    const u16 *page = page_at(row, last), *other = page_at(row, before);
    bool of_stamp = word >= 2 && word < 6;
    t.last = of_stamp ? ((const int *)page)[STAMP_WORD + word - 2] : 0;
    t.before = of_stamp ? ((const int *)other)[STAMP_WORD + word - 2] : 0;
#pragma unroll
    for (int i = 0; i < (NUM_BLOCKS + 3) / 4; i++) {
        int block = min_(i * 4 + lane / 8, NUM_BLOCKS - 1);
        t.found[i] = ((const int *)state_block(row, block))[word];
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
            int *header = (int *)state_block(row, b);
            header[lane] = lane == 0 ? MAGIC : lane == 1 ? target : lane == 6 ? b : stamp;
        }
    }
}

// Fold the pages `covered .. target - 1` into this block's rows of the state. A warp has some rows, or,
// where a block has few rows, some of the tokens of each page, and the sums meet in the ring.
DEVICE void fold(const Shared &s, const Row &row, int rank, int covered, int target, int warp, int lane) {
    constexpr int MOST = ROWS_OF_BLOCK < 8 ? ROWS_OF_BLOCK : 8;  // rows at a time
    constexpr int CHUNKS = (ROWS_OF_BLOCK + MOST - 1) / MOST;
    constexpr int sharing = CHUNKS < WARPS ? WARPS / CHUNKS : 1;  // warps a chunk
    int first_row = first_of(D, rank), last_row = first_of(D, rank + 1);
    int part = warp % sharing;
    int column = lane % STATE_LANES * 4;
    int sub = lane / STATE_LANES;
    for (int first_chunk = 0; first_chunk < CHUNKS; first_chunk += WARPS / sharing) {
        int base = first_row + (first_chunk + warp / sharing) * MOST;
        int chunk = min_(max_(last_row - base, 0), MOST);
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

DEVICE void prefetch_state(const Row &row, int rank, int tid) {
    constexpr int LINES = (D * 4 + 127) / 128;  // of a row
    int first = first_of(D, rank), num_rows = first_of(D, rank + 1) - first;
#pragma unroll 1
    for (int i = tid; i < num_rows * LINES; i += THREADS)
        prefetch(state_row(row, first + i / LINES) + i % LINES * 32);
    if (tid < LINES) prefetch(state_row(row, D + 1) + tid * 32);
    if (rank == 0 && tid < LINES) prefetch(state_row(row, D) + tid * 32);
}

constexpr int STATE_ROWS_OF_WARP = (ROWS_OF_BLOCK + WARPS - 1) / WARPS;
constexpr int STATE_ROWS_AHEAD = 2;  // of a lane

// What a lane reads of the state, on its way: the first rows of its warp and their z; sum v.
struct StateAhead {
    Four x[STATE_ROWS_AHEAD];
    float z[STATE_ROWS_AHEAD];
    Four v;
};

DEVICE StateAhead ask_state(const Row &row, int rank, int warp, int lane) {
    int first = first_of(D, rank) + warp * STATE_ROWS_OF_WARP, num = min_(first_of(D, rank + 1) - first, STATE_ROWS_OF_WARP);
    int column = lane % STATE_LANES * 4, sub = lane / STATE_LANES;
    StateAhead out = {};
#pragma unroll
    for (int j = 0; j < STATE_ROWS_AHEAD; j++) {
        int i = sub + j * STATE_ROWS_AT_ONCE;
        if (i < num) {
            out.x[j] = *(const Four *)(state_row(row, first + i) + column);
            out.z[j] = state_row(row, D + 1)[first + i];
        }
    }
    if (rank == 0 && warp == 0) out.v = *(const Four *)(state_row(row, D) + column);
    return out;
}

DEVICE void read_state(
    StateRead &out, const StateAhead &ahead, const Shared &s, const Row &row, int rank, int warp, int lane) {
    int first = first_of(D, rank) + warp * STATE_ROWS_OF_WARP, num = min_(first_of(D, rank + 1) - first, STATE_ROWS_OF_WARP);
    int column = lane % STATE_LANES * 4, sub = lane / STATE_LANES;
    const float *z = state_row(row, D + 1);
#pragma unroll
    for (int h = 0; h < GP; h++) {
        out.z[h] = 0.0f;
#pragma unroll
        for (int j = 0; j < 4; j++) out.s[h][j] = 0.0f;
    }
    auto add = [&](int i, const Four &x, float x_z) {
#pragma unroll
        for (int h = 0; h < GP; h++) {
            float q = s.scaled[h * D + first + i];
            out.z[h] += q * x_z;
#pragma unroll
            for (int j = 0; j < 4; j++) out.s[h][j] += q * x.x[j];
        }
    };
#pragma unroll
    for (int j = 0; j < STATE_ROWS_AHEAD; j++)
        if (sub + j * STATE_ROWS_AT_ONCE < num) add(sub + j * STATE_ROWS_AT_ONCE, ahead.x[j], ahead.z[j]);
#pragma unroll 4
    for (int i = sub + STATE_ROWS_AHEAD * STATE_ROWS_AT_ONCE; i < num; i += STATE_ROWS_AT_ONCE)
        add(i, *(const Four *)(state_row(row, first + i) + column), z[first + i]);
#pragma unroll
    for (int j = 0; j < 4; j++) out.v[j] = ahead.v.x[j];
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

// Shares of a block are cut into tiles of 16 units; warp `w` has the tiles `w`, `w + 8`, ... Lanes `0 .. 15` fetch ids.
DEVICE int tiles_of(int num, int warp) {
    int tiles = ceil_div(num, TILE);
    return tiles > warp ? ceil_div(tiles - warp, WARPS) : 0;
}

// Page id of the unit `r` of a warp's `k`-th tile; behind the last unit, the last again.
DEVICE int unit_of(int first, int num, int warp, int k, int r) { return first + min_((warp + k * WARPS) * TILE + r, num - 1); }

// Ask for a warp's `k`-th tile; lane `from_lane + r` has the place of its unit `r`.
DEVICE void issue_tile(const Shared &s, const Row &row, int k, u32 place, int from_lane, int warp, int lane) {
    int r = lane / STATISTIC_LANES;
    char *to = s.ring + warp * RING_BYTES + (k % STAGES * TILE + r) * STATISTIC_STRIDE + lane % STATISTIC_LANES * 16;
    const char *from = opaque((const char *)row.kv + lane % STATISTIC_LANES * 16);
#pragma unroll
    for (int j = 0; j < TILE; j += 32 / STATISTIC_LANES)
        copy_in(to + j * STATISTIC_STRIDE, from + (u64)(u32)shuffle((int)place, from_lane + r + j) * STEP);
}

// Of the second half of a unit's bytes, variances in e5m2: the upper halves of float16 numbers. For quest e4m3, as the first.
DEVICE u32 second_lower(u32 x) { return SELECTOR == QUEST ? e4m3_lower(x) : spread_lower(x); }
DEVICE u32 second_upper(u32 x) { return SELECTOR == QUEST ? e4m3_upper(x) : spread_upper(x); }

#if !SCORED
// Scores, and masses where there is a residual, of this block's units; the warp's maximum of its scores and sum of
// exponentials from it, in `s.warp [warp][2][GP]`. The first `STAGES` tiles have been asked for.
DEVICE void score_units(const Shared &s, const Row &row, const Params &p, int first, int num, int warp, int lane) {
    const char *ring = s.ring + warp * RING_BYTES;
    int tiles = tiles_of(num, warp);
    u32 next = 0;  // place of this lane's unit of the tiles to be asked for next: `TILE` lanes a tile
    auto look_up = [&](int k) {
        int unit = unit_of(first, num, warp, k + (TILES > 1 ? lane / TILE : 0), lane % TILE);
        return place_of(row, page_id(s, row, unit / UNITS_PER_PAGE), unit);
    };
    if (STAGES < tiles) next = look_up(STAGES);

    // Units are the rows of the left side, heads the columns of the right one: `q` for the first half of a statistic, `q^2`
    // for the second. Its low part has the columns 4 to 7, or, where there are more than four heads, a product of its own.
    // For quest the halves meet the negative and the positive part of q.
    constexpr bool QUEST_ = SELECTOR == QUEST, OWN_PRODUCT = GP > 4 && !QUEST_;
    u32 q[D / 16][2], square[D / 16][2], rest[OWN_PRODUCT ? D / 16 : 1][2];
    int matrix = lane / 8, r = lane % 8;
    int second_part = QUEST_ || (GP <= 4 && (FP8 ? lane / 4 : r) >= 4) ? 2 : 1;
#if FP8
    // Of 16 neighbouring bytes of a unit a lane gets four, `lane % 4 * 4 ..`, which it feeds in two pairs to the two halves of a
    // product of 16: so they meet the same four of q. A sum does not ask for the order.
#pragma unroll
    for (int k = 0; k < D / 16; k++) {
        auto ask = [&](u32 (&to)[2], int part) {
            Pair x = *(const Pair *)(s.query + (part * 8 + lane / 4) * QUERY_STRIDE + k * 16 + lane % 4 * 4);
            to[0] = x.x[0];
            to[1] = x.x[1];
        };
        ask(q[k], QUEST_ ? 1 : OWN_QUERY ? 3 : 0);
        ask(square[k], second_part);
        if constexpr (OWN_PRODUCT) ask(rest[k], 2);
    }
#else
#pragma unroll
    for (int k = 0; k < D / 16; k += 2) {
        u32 x[4];
        load_tiles(x, s.query + (QUEST_ * 8 + r) * QUERY_STRIDE + k * 16 + matrix * 8);
#pragma unroll
        for (int j = 0; j < 4; j++) q[k + j / 2][j % 2] = x[j];
        load_tiles(x, s.query + (second_part * 8 + r) * QUERY_STRIDE + k * 16 + matrix * 8);
#pragma unroll
        for (int j = 0; j < 4; j++) square[k + j / 2][j % 2] = x[j];
        if constexpr (OWN_PRODUCT) {
            load_tiles(x, s.query + (16 + r) * QUERY_STRIDE + k * 16 + matrix * 8);
#pragma unroll
            for (int j = 0; j < 4; j++) rest[k + j / 2][j % 2] = x[j];
        }
    }
#endif
    int half = half_of(lane), head = head_of(lane);
    float restore[2], top[2], sum[2];  // of a lane's heads
#pragma unroll
    for (int j = 0; j < 2; j++) {
        restore[j] = s.restore[(head + j) % GP];
        top[j] = -infinity();
        sum[j] = 0.0f;
    }

    for (int k = 0; k < tiles; k += TILES) {
        wait_copies<STAGES - TILES>();
        sync_warp();
        // Behind the last tile there may be another in `TILES`, of whatever the ring holds; its units are behind the last.
        const char *rows = ring + (k % STAGES * TILE + matrix % 2 * 8 + r) * STATISTIC_STRIDE + matrix / 2 * 16;
        float linear[TILES][4] = {}, second[TILES][4] = {};
#if FP8
#pragma unroll
        for (int i = 0; i < D / 32; i++) {
            u32 x[TILES][4], y[TILES][4];
#pragma unroll
            for (int t = 0; t < TILES; t++) {
                load_tiles(x[t], rows + t * TILE * STATISTIC_STRIDE + i * 32);
                load_tiles(y[t], rows + t * TILE * STATISTIC_STRIDE + D + i * 32);
            }
#pragma unroll
            for (int j = 0; j < 2; j++) {
#pragma unroll
                for (int t = 0; t < TILES; t++) {
                    u32 upper = x[t][2 * j], lower = x[t][2 * j + 1];
                    multiply_half(
                        linear[t], e4m3_lower(upper), e4m3_lower(lower), e4m3_upper(upper), e4m3_upper(lower),
                        q[2 * i + j][0], q[2 * i + j][1]);
                    upper = y[t][2 * j], lower = y[t][2 * j + 1];
                    u32 y0 = second_lower(upper), y1 = second_lower(lower), y2 = second_upper(upper), y3 = second_upper(lower);
                    multiply_half(second[t], y0, y1, y2, y3, square[2 * i + j][0], square[2 * i + j][1]);
                    if constexpr (OWN_PRODUCT) multiply_half(second[t], y0, y1, y2, y3, rest[2 * i + j][0], rest[2 * i + j][1]);
                }
            }
        }
#else
#pragma unroll
        for (int i = 0; i < D / 16; i++)
#pragma unroll
            for (int t = 0; t < TILES; t++) {
                u32 x[4], y[4];
                load_tiles(x, rows + t * TILE * STATISTIC_STRIDE + i * 32);
                load_tiles(y, rows + t * TILE * STATISTIC_STRIDE + 2 * D + i * 32);
                multiply(linear[t], x[0], x[1], x[2], x[3], q[i][0], q[i][1]);
                multiply(second[t], y[0], y[1], y[2], y[3], square[i][0], square[i][1]);
                if constexpr (OWN_PRODUCT) multiply(second[t], y[0], y[1], y[2], y[3], rest[i][0], rest[i][1]);
            }
#endif
        sync_warp();  // all lanes have read the stages
        auto refill = [&]() {
#pragma unroll
            for (int t = 0; t < TILES; t++) {
                if (k + t + STAGES < tiles) issue_tile(s, row, k + t + STAGES, next, t * TILE, warp, lane);
                close_copies();
            }
            if (k + TILES + STAGES < tiles) next = look_up(k + TILES + STAGES);
        };
        // A multiprocessor takes rows at a pace, and a warp that asks for more waits. So half of the warps ask while the
        // others compute.
        bool early = TILES == 1 || warp % 2;
        if (early) refill();
#pragma unroll
        for (int j = 0; j < 2; j++) {
            float score[TILES][HALVES], best = top[j];
#pragma unroll
            for (int t = 0; t < TILES; t++)
#pragma unroll
                for (int i = 0; i < HALVES; i++) {
                    int unit = (warp + (k + t) * WARPS) * TILE + lane / 4 + (half + i) * 8;
                    Score x = score_of(linear[t], second[t], half, i, j, restore[j], p.scale);
                    score[t][i] = x.score;
                    if (unit >= num) {
                        score[t][i] = -infinity();
                    } else if (head + j < GP) {
                        s.score[unit * GP + head + j] = score[t][i];
#if RESIDUAL
                        s.mass[unit * GP + head + j] = x.mass;
#endif
                    }
                    best = max_(best, score[t][i]);
                }
            float anchor = finite_or_0(best);
            sum[j] *= exp_(top[j] - anchor);
#pragma unroll
            for (int t = 0; t < TILES; t++)
#pragma unroll
                for (int i = 0; i < HALVES; i++) sum[j] += exp_(score[t][i] - anchor);
            top[j] = best;
        }
        if (!early) refill();
    }
#pragma unroll 1
    for (int other = GP > 4 ? 4 : 2; other < 32; other *= 2) {
#pragma unroll
        for (int j = 0; j < 2; j++) {
            float best = max_(top[j], shuffle_xor(top[j], other)), anchor = finite_or_0(best);
            sum[j] *= exp_(top[j] - anchor);
            sum[j] += shuffle_xor(sum[j], other);
            top[j] = best;
        }
    }
#pragma unroll
    for (int j = 0; j < 2; j++) {
        if (lane < 4 && half == 0 && head + j < GP) {
            s.warp[warp * 2 * GP + head + j] = top[j];
            s.warp[warp * 2 * GP + GP + head + j] = sum[j];
        }
    }
}
#endif

#if SCORED
// Scores, and masses where there is a residual, of this block's units, that `spla_score_units` has made.
DEVICE void fetch_scores(const Shared &s, const Params &p, i64 pair, int first, int num, int tid) {
    auto fetch = [&](float *to, const float *from) {
        from += (pair * p.max_units + first) * GP;
        if constexpr (GP % 4 == 0) {
#pragma unroll 4
            for (int i = tid; i < num * GP / 4; i += THREADS) copy_in(to + i * 4, from + i * 4);
        } else {
            for (int i = tid; i < num * GP; i += THREADS) copy_word(to + i, from + i);
        }
    };
    fetch(s.score, p.scores);
    if (RESIDUAL) fetch(s.mass, p.mass);
}
#endif

#if SCORED || FINE
// Maximum of a warp's share of scores that stand in `s.score`, and sum of exponentials from it, in `s.warp [warp][2][GP]`.
DEVICE void norms_of_scores(const Shared &s, int num, int warp, int lane) {
    float top = -infinity(), sum = 0.0f;  // of head `lane % GP`
    int begin = warp * 32 + lane;
#pragma unroll 4
    for (int i = begin; i < num * GP; i += THREADS) top = max_(top, s.score[i]);
#pragma unroll
    for (int other = GP; other < 32; other *= 2) top = max_(top, shuffle_xor(top, other));
    float anchor = finite_or_0(top);
#pragma unroll 4
    for (int i = begin; i < num * GP; i += THREADS) sum += exp_(s.score[i] - anchor);
#pragma unroll
    for (int other = GP; other < 32; other *= 2) sum += shuffle_xor(sum, other);
    if (lane < GP) {
        s.warp[warp * 2 * GP + lane] = top;
        s.warp[warp * 2 * GP + GP + lane] = sum;
    }
}
#endif

// Maximum of this block's scores and sum of exponentials from it, for each head, to all blocks of the cluster.
DEVICE void share_norms(const Shared &s, int rank, int tid) {
    for (int i = tid; i < BLOCKS * GP; i += THREADS) {
        int h = i % GP;
        float top = -infinity();
#pragma unroll
        for (int w = 0; w < WARPS; w++) top = max_(top, s.warp[w * 2 * GP + h]);
        float anchor = finite_or_0(top), sum = 0.0f;
#pragma unroll
        for (int w = 0; w < WARPS; w++) sum += s.warp[w * 2 * GP + GP + h] * exp_(s.warp[w * 2 * GP + h] - anchor);
        float *to = of_block(s.norms + rank * 2 * GP + h, i / GP);
        to[0] = top;
        to[GP] = sum;
    }
}

// A warp has neighbouring units of the block's share, so that prefix sums order them.
struct Mine {
    int start, stop;
};

DEVICE Mine units_of(int num, int warp) {
    int per_warp = ceil_div(num, THREADS) * 32, start = min_(warp * per_warp, num);
    return {start, min_(start + per_warp, num)};
}

// Of complete pages: units that are selected anyway, the first and the last ones.
struct Forced {
    int leading, trailing;  // end of the leading, begin of the trailing
};

DEVICE Forced forced_units(const Row &row, const Params &p) {
    int leading = min_(p.first, row.num_units);
    return {leading, min_(max_(row.position / UNIT - p.last + 1, leading), row.num_units)};
}
DEVICE bool is_forced(const Forced &f, int unit) { return unit < f.leading || unit >= f.trailing; }
DEVICE int forced_before(const Forced &f, int unit) { return min_(unit, f.leading) + max_(unit - f.trailing, 0); }

// Keys of this block's units, or of all fine blocks, from the scores in `s.score`; `norms [parts][2 GP]`, maxima and sums of parts
// of all scores, are joined, and kept in `to_lse` if that is anywhere. `unit(i)` is the unit that the `i`-th is, or is of.
template <typename Unit>
DEVICE void make_keys(
    const Shared &s, const float *norms, int parts, u32 *keys, float *to_lse, const Forced &forced, int num, int tid, Unit unit) {
    int lane = tid % 32;
    // A lane has head `lane % GP` of every so many-th part.
    constexpr int ROUNDS = ((FINE ? max_of(BLOCKS, WARPS) : BLOCKS) * GP + 31) / 32;
    float tops[ROUNDS], sums[ROUNDS], top = -infinity(), sum = 0.0f;
#pragma unroll
    for (int i = 0; i < ROUNDS; i++) {
        int b = lane / GP + i * (32 / GP);
        tops[i] = b < parts ? norms[b * 2 * GP + lane % GP] : -infinity();
        sums[i] = b < parts ? norms[b * 2 * GP + GP + lane % GP] : 0.0f;
        top = max_(top, tops[i]);
    }
#pragma unroll
    for (int other = GP; other < 32; other *= 2) top = max_(top, shuffle_xor(top, other));
#pragma unroll
    for (int i = 0; i < ROUNDS; i++) sum += sums[i] * exp_(tops[i] - top);
#pragma unroll
    for (int other = GP; other < 32; other *= 2) sum += shuffle_xor(sum, other);
    float log_sum = log_(sum), mine = top + log_sum;
    if (to_lse && tid < GP) to_lse[tid] = mine;
    // No group score is larger than the bound.
    float lse[GROUP], bound = -infinity();
#pragma unroll
    for (int h = 0; h < GROUP; h++) {
        lse[h] = shuffle(mine, h);
        bound = max_(bound, -shuffle(log_sum, h));
    }
    bound += log_((float)GROUP);

    Mine units = units_of(num, tid / 32);
#pragma unroll 1
    for (int i = units.start + lane; i < units.stop; i += 32) {
        float best = -infinity(), x[GROUP];
#pragma unroll
        for (int h = 0; h < GROUP; h++) {
            x[h] = s.score[i * GP + h] - lse[h];
            best = max_(best, x[h]);
        }
        float total = 0.0f, anchor = finite_or_0(best);
#pragma unroll
        for (int h = 0; h < GROUP; h++) total += exp_(x[h] - anchor);
        float less = bound - (anchor + log_(total));
        u32 key = less == less ? (u32)as_int(max_(less, 0.0f)) : END_OF_KEYS - 1;  // NaN is last
        keys[i] = is_forced(forced, unit(i)) ? FORCED : key;
    }
}

// The keys `lower .. upper - 1` in bins of `1 << shift` from `origin` on; the first and the last bin reach to the ends.
struct Bins {
    u32 lower, upper, origin;
    int shift;
};

// The list of the `n_complete` units, or fine blocks, that are selected: the `num_forced`, and of the others those of least key, ties to
// the lower number. First what is surely selected, in the order of the keys' places, then the rest by key. `name(i)` is the number in
// the sequence of the `i`-th key's, `taken(i)` hears of those of this block; `between` runs while the blocks wait for each other. The
// blocks have a share each, of which `forced_ahead` were forced in the blocks before, or this one has all (`alone`).
template <typename Name, typename Taken, typename Between>
DEVICE void select(
    const Shared &s, const u32 *keys, int num_forced, int forced_ahead, int n_complete, int num, bool alone, int rank, int tid,
    Name name, Taken taken, Between between) {
    int lane = tid % 32, warp = tid / 32;
    Mine units = units_of(num, warp);
    int free = n_complete - num_forced;
    Bins range = {0, END_OF_KEYS, FIRST_BIN << BIN_SHIFT, BIN_SHIFT};
    int better = 0, better_before = 0;  // units of less key than the range; those of the blocks before this one
    int members, members_before;        // units in the bin of the threshold
#pragma unroll 1
    for (int level = 0;; level++) {
        if (level > 0) {
            if (alone) sync_block();  // all warps have read the bins
            if (tid < BIN_WORDS) s.bins[tid] = 0;
            sync_block();
        }
        auto bin_of = [&](u32 key) {
            int bin = (int)(max_(key, range.origin) - range.origin >> range.shift);
            return min_(bin, BINS - 1);
        };
#pragma unroll 1
        for (int i = units.start + lane; i < units.stop; i += 32) {
            u32 key = keys[i];
            if (key >= range.lower && key < range.upper) {
                int bin = bin_of(key);
                add_to(s.bins + bin / 2, bin % 2 ? 65536u : 1u);
            }
        }
        sync_block();
        u32 *all_bins = alone ? s.bins : s.all_bins + level % 2 * BLOCKS * BIN_WORDS;
        if (!alone) {
#pragma unroll 1
            for (int i = tid; i < BLOCKS * BIN_WORDS / 4; i += THREADS) {
                Words *to = (Words *)all_bins + rank * (BIN_WORDS / 4) + i % (BIN_WORDS / 4);
                *of_block(to, i / (BIN_WORDS / 4)) = ((const Words *)s.bins)[i % (BIN_WORDS / 4)];
            }
            sync_cluster();
        }
        // Every warp for itself, a lane eight bins.
        u32 all[4] = {}, before[4] = {};
#pragma unroll 4
        for (int b = 0; b < (alone ? 1 : BLOCKS); b++) {
            Words x = ((const Words *)all_bins)[b * (BIN_WORDS / 4) + lane];
#pragma unroll
            for (int i = 0; i < 4; i++) {
                all[i] += x.x[i];
                if (!alone && b < rank) before[i] += x.x[i];
            }
        }
        auto half = [](const u32 (&words)[4], int j) { return (int)(j % 2 ? words[j / 2] >> 16 : words[j / 2] & 65535); };
        int sum = 0;
#pragma unroll
        for (int j = 0; j < 8; j++) sum += half(all, j);
        int upto = sum;  // of the lanes up to this one
#pragma unroll
        for (int by = 1; by < 32; by *= 2) {
            int other = (int)shuffle_up((u32)upto, by);
            if (lane >= by) upto += other;
        }
        int wanted = free - better;
        u32 having = ballot(upto >= wanted);
        int owner = popcount((having & -having) - 1);
        int above = upto - sum, at_bin = above, bin = 0;  // units of better bins; and of this one, too
        bool found = false;
#pragma unroll
        for (int j = 0; j < 8; j++) {
            bin = found ? bin : j;
            above = found ? above : at_bin;
            at_bin += found ? 0 : half(all, j);
            found = at_bin >= wanted;
        }
        bin = shuffle(lane * 8 + bin, owner);
        members = shuffle(at_bin - above, owner);
        better += shuffle(above, owner);
        u32 of_better = 0, of_members = 0;
#pragma unroll
        for (int j = 0; j < 8; j++) {
            of_better += lane * 8 + j < bin ? half(before, j) : 0;
            of_members += lane * 8 + j == bin ? half(before, j) : 0;
        }
        better_before += warp_sum(of_better);
        members_before = warp_sum(of_members);
        u32 from = range.origin + ((u32)bin << range.shift), to = from + (1u << range.shift);
        if (bin > 0) range.lower = from;
        if (bin < BINS - 1) range.upper = to;
        if (members <= MEMBERS || range.upper - range.lower == 1) break;
        // Hundreds of units that weigh about the same.
        range.origin = range.lower;
        range.shift = max_(24 - leading_zeros(range.upper - range.lower - 1), 0);
    }

    // What is surely selected, and the members of the bin; of many that weigh just the same, the first are taken.
    int wanted = free - better;  // members
    bool ranked = members <= MEMBERS;
    int sure = num_forced + better;
    u32 counts = 0;  // of the first kind, and of the second in the upper half
    auto kind = [&](u32 key) { return key == FORCED || key < range.lower ? 1u : key < range.upper ? 65536u : 0u; };
#pragma unroll 1
    for (int i = units.start + lane; i < units.stop; i += 32) counts += kind(keys[i]);
    counts = warp_sum(counts);
    if (lane == 0) s.count[warp] = counts;
    sync_block();
    u32 ahead = 0;
#pragma unroll
    for (int w = 0; w < WARPS; w++) ahead += w < warp ? s.count[w] : 0;
    int at_sure = forced_ahead + better_before + (int)(ahead & 65535);
    int at_member = members_before + (int)(ahead >> 16);
#pragma unroll 1
    for (int base = units.start; base < units.stop; base += 32) {
        int i = base + lane;
        u32 key = i < units.stop ? keys[i] : END_OF_KEYS;
        u32 mine = kind(key);
        u32 all_sure = ballot(mine == 1), all_members = ballot(mine == 65536);
        u32 lanes_before = (1u << lane) - 1;
        int place = at_sure + popcount(all_sure & lanes_before), member = at_member + popcount(all_members & lanes_before);
        bool selected = mine == 1;
        if (mine == 65536 && !ranked && member < wanted) {
            place = sure + member;
            selected = true;
        }
        if (selected) {
#pragma unroll 4
            for (int b = alone ? rank : 0; b < (alone ? rank + 1 : BLOCKS); b++)
                *of_block(s.list + min_(place, n_complete - 1), b) = name(i);
            taken(i);
        } else if (mine == 65536 && ranked) {
#pragma unroll 4
            for (int b = alone ? rank : 0; b < (alone ? rank + 1 : BLOCKS); b++)
                *of_block(s.members + min_(member, MEMBERS - 1), b) = (u64)key << 32 | (u32)name(i);
        }
        at_sure += popcount(all_sure);
        at_member += popcount(all_members);
    }
    sync_warp();
    if (!alone) arrive_at_cluster();
    between();
    sync_warp();
    if (alone)
        sync_block();
    else
        wait_for_cluster();
    if (ranked) {
        // A warp a member, whom its lanes compare with those that they have.
        u64 all[MEMBERS_OF_LANE];
#pragma unroll
        for (int k = 0; k < MEMBERS_OF_LANE; k++) all[k] = k * 32 + lane < members ? s.members[k * 32 + lane] : ~(u64)0;
#pragma unroll 1
        for (int i = warp; i < members; i += WARPS) {
            u64 mine = s.members[i];
            int place = 0;
#pragma unroll
            for (int k = 0; k < MEMBERS_OF_LANE; k++) place += popcount(ballot(all[k] < mine));
            int number = (int)(u32)mine, own = number - name(0);
            if (lane > 0 || place >= wanted) continue;
            s.list[min_(sure + place, n_complete - 1)] = number;
            if (own >= 0 && own < num) taken(own);
        }
    }
    sync_block();
}

// How many of `num` numbers are less than `x`.
DEVICE int place_in(const int *numbers, int num, int x) {
    int place = 0;
#pragma unroll 2
    for (int k = 0; k < num / 4; k++) {
        Words four = ((const Words *)numbers)[k];
#pragma unroll
        for (int i = 0; i < 4; i++) place += (int)four.x[i] < x;
    }
#pragma unroll 1
    for (int k = num / 4 * 4; k < num; k++) place += numbers[k] < x;
    return place;
}

#if FINE
// ---------------------------------------------------------------------------------------------------- the fine level

// Where a piece of 16 bytes stands in the ring, so that eight tokens' words of one chunk lie in different banks.
DEVICE int piece_at(int token, int chunk) {
    return token * KEY_CHUNKS + (chunk ^ token * KEY_CHUNKS / 8 % KEY_CHUNKS);
}

// Ask for sketch and mean of a warp's `k`-th candidate.
DEVICE void issue_sketch(const Shared &s, const Row &row, int unit, int k, int warp, int lane) {
    const char *page = opaque((const char *)(row.kv + page_id(s, row, unit / UNITS_PER_PAGE) * row.page_stride) + lane * 16);
    int in_page = unit % UNITS_PER_PAGE;
    const char *codes = page + SKETCH_AT + in_page * CODE_BYTES, *scales = page + SKETCH_AT + SKETCH_SCALES + in_page * SCALE_BYTES;
    char *to = s.ring + warp * RING_BYTES + k % SKETCHES * SKETCH_STRIDE, *plain = to + lane * 16;
    // 32 pieces on, a piece stands as before.
    char *swizzled = to + piece_at(lane / KEY_CHUNKS, lane % KEY_CHUNKS) * 16;
#pragma unroll
    for (int i = 0; i < CODE_BYTES; i += 512) copy_in(swizzled + i, codes + i);
#pragma unroll
    for (int i = 0; i < SCALE_BYTES; i += 512)
        if (i + lane * 16 < SCALE_BYTES) copy_in(plain + CODE_BYTES + i, scales + i);
    if (lane * 16 < MEAN_BYTES) copy_in(plain + CODE_BYTES + SCALE_BYTES, page + PAGE * ROW_BYTES + in_page * STATISTIC_BYTES);
}

// Log masses of the fine blocks of this block's candidates, `num` from the `first`-th on, to the `s.score` of all blocks. Codes
// meet q in integers; of the eight codes of a lane's word the even channels are one operand, the odd ones the other.
DEVICE void score_fine(const Shared &s, const Row &row, const Params &p, int first, int num, int warp, int lane) {
    int count = num > warp ? ceil_div(num - warp, WARPS) : 0;
    int l = lane % 4, token = lane / 4;
    u32 q[HEAD_TILES][KEY_CHUNKS][2];
    int zero[HEAD_TILES][KEY_CHUNKS][4];  // what products with codes begin with: codes are 8 too large; and `INTEGER`
    float step[HEAD_TILES];               // of the logits of the lane's heads, `4 t + l`
#pragma unroll
    for (int t = 0; t < HEAD_TILES; t++) {
        step[t] = s.step[(t * 4 + l) % GP];
#pragma unroll
        for (int c = 0; c < KEY_CHUNKS; c++) {
            Pair x = *(const Pair *)(s.bytes + (t * 8 + token) * BYTES_STRIDE + c * 32 + l * 8);
#pragma unroll
            for (int i = 0; i < 2; i++) q[t][c][i] = x.x[i];
            int none[4] = {}, sum[4];
            constexpr u32 EIGHTS = 0x08080808u;
            multiply_bytes(sum, EIGHTS, EIGHTS, EIGHTS, EIGHTS, q[t][c][0], q[t][c][1], none);
#pragma unroll
            for (int j = 0; j < 4; j++) zero[t][c][j] = INTEGER - sum[j];
        }
    }
    const u16 *of_mean = s.query + token * QUERY_STRIDE + (OWN_QUERY ? 24 * QUERY_STRIDE : 0);
    // The first turns only ask: code that runs once costs its fetching.
#pragma unroll 1
    for (int k = -SKETCHES; k < count; k++) {
        if (k >= 0) {
            wait_copies<SKETCHES - 1>();
            sync_warp();
            const char *ring = s.ring + warp * RING_BYTES + k % SKETCHES * SKETCH_STRIDE;
            // The mean is the first row of a tile whose others are zero.
            float mean[2][4] = {};
#pragma unroll
            for (int i = 0; i < D / 16; i++) {
                Pair b = *(const Pair *)(of_mean + i * 16 + l * 4);
                const char *from = ring + CODE_BYTES + SCALE_BYTES + i * (FP8 ? 16 : 32) + l * (FP8 ? 4 : 8);
#if FP8
                u32 x = lane < 4 ? *(const u32 *)from : 0;
                multiply_half(mean[i % 2], e4m3_lower(x), 0, e4m3_upper(x), 0, b.x[0], b.x[1]);
#else
                Pair x = {{0, 0}};
                if (lane < 4) x = *(const Pair *)from;
                multiply(mean[i % 2], x.x[0], 0, x.x[1], 0, b.x[0], b.x[1]);
#endif
            }
            float base[HEAD_TILES];
#pragma unroll
            for (int t = 0; t < HEAD_TILES; t++) {
                float even = shuffle(mean[0][0] + mean[1][0], t * 2 + l / 2), odd = shuffle(mean[0][1] + mean[1][1], t * 2 + l / 2);
                base[t] = (l % 2 ? odd : even) * p.scale;
            }
            // Lane `8 c + r` names the piece of chunk `c` of a tile's row `r`, so that a lane gets its word of each chunk.
            int matrix = lane / 8 % KEY_CHUNKS;
            const u16 *scales = (const u16 *)(ring + CODE_BYTES);
            float logit[HEAD_TILES][FINE_PER_UNIT][2] = {};
#pragma unroll
            for (int fine = 0; fine < FINE_PER_UNIT; fine++) {
                u32 words[2][4], of_row[2][KEY_CHUNKS / 2];
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    int first_row = fine * TILE + i * 8;
                    load_tiles(words[i], ring + piece_at(first_row + lane % 8, matrix) * 16);
#pragma unroll
                    for (int c = 0; c < KEY_CHUNKS; c += 2) of_row[i][c / 2] = *(const u32 *)(scales + (first_row + token) * KEY_CHUNKS + c);
                }
#pragma unroll
                for (int c = 0; c < KEY_CHUNKS; c++) {
                    u32 a[4] = {words[0][c], words[1][c], words[0][c] >> 4, words[1][c] >> 4};
#pragma unroll
                    for (int i = 0; i < 4; i++) a[i] &= 0x0f0f0f0fu;
#pragma unroll
                    for (int t = 0; t < HEAD_TILES; t++) {
                        int product[4];
                        multiply_bytes(product, a[0], a[1], a[2], a[3], q[t][c][0], q[t][c][1], zero[t][c]);
#pragma unroll
                        for (int i = 0; i < 2; i++) {
                            float upper = as_float(product[2 * i]) - INTEGER_ZERO, lower = as_float(product[2 * i + 1]) - INTEGER_ZERO;
                            logit[t][fine][i] += half_to_float((u16)(of_row[i][c / 2] >> c % 2 * 16)) * (upper * 256.0f + lower);
                        }
                    }
                }
            }
            // Over the tokens of all tiles at once, so that no exchange waits for another.
#pragma unroll
            for (int t = 0; t < HEAD_TILES; t++) {
                float top[FINE_PER_UNIT], sum[FINE_PER_UNIT];
#pragma unroll
                for (int fine = 0; fine < FINE_PER_UNIT; fine++) top[fine] = larger(logit[t][fine][0] * step[t], logit[t][fine][1] * step[t]);
#pragma unroll
                for (int other = 4; other < 32; other *= 2)
#pragma unroll
                    for (int fine = 0; fine < FINE_PER_UNIT; fine++) top[fine] = larger(top[fine], shuffle_xor(top[fine], other));
#pragma unroll
                for (int fine = 0; fine < FINE_PER_UNIT; fine++)
                    sum[fine] = exp_(logit[t][fine][0] * step[t] - top[fine]) + exp_(logit[t][fine][1] * step[t] - top[fine]);
#pragma unroll
                for (int other = 4; other < 32; other *= 2)
#pragma unroll
                    for (int fine = 0; fine < FINE_PER_UNIT; fine++) sum[fine] += shuffle_xor(sum[fine], other);
                // All lanes of a head have its scores: each brings them to another thread block.
                if (t * 4 + l < GP)
#pragma unroll
                    for (int block = 0; block < BLOCKS; block += 8)
                        if (block + token < BLOCKS)
#pragma unroll
                            for (int fine = 0; fine < FINE_PER_UNIT; fine++) {
                                float *to = s.score + ((first + warp + k * WARPS) * FINE_PER_UNIT + fine) * GP + t * 4 + l;
                                *of_block(to, block + token) = base[t] + top[fine] + log_(sum[fine]);
                            }
            }
            sync_warp();  // all lanes have read the sketch
        }
        if (k + SKETCHES < count) issue_sketch(s, row, s.candidates[first + warp + (k + SKETCHES) * WARPS], k + SKETCHES, warp, lane);
        close_copies();
    }
}
#endif

// ----------------------------------------------------------------------------------------------------- attention

struct Tokens {
    int limit;       // of the list: tokens that exist
    int covered;     // of these, leading ones that the state covers
    int start, stop; // this warp's steps of TOKENS
    int complete;    // blocks of complete pages in the list
    bool all;        // the list is all blocks there are
};

DEVICE int listed_block(const Shared &s, const Row &row, const Tokens &n, int entry) {
    // Behind the complete blocks of the list stand the current page's.
    return n.all ? entry : entry < n.complete ? s.list[entry] : row.num_units * FINE_PER_UNIT + entry - n.complete;
}

// The selection, in ascending order.
DEVICE void write_table(const Shared &s, const Row &row, const Params &p, const Tokens &n, i64 token, int tid) {
    int entries = (n.limit + ATTENDED - 1) / ATTENDED;
    i64 pair = token * p.num_kv_heads + row.head;
#pragma unroll 1
    for (int i = tid; i < min_(entries, p.table_width); i += THREADS) {
        int block = listed_block(s, row, n, i), place = i;
        if (!n.all && i < n.complete) place = place_in(s.list, n.complete, block);
        p.table[pair * p.table_width + place] =
            (page_id(s, row, block / ATTENDED_PER_PAGE) * p.num_kv_heads + row.head) * ATTENDED_PER_PAGE + block % ATTENDED_PER_PAGE;
    }
    if (tid == 0) p.count[pair] = entries;
}

#if FINE
// The candidates, ascending, where some blocks are left out: `num` of complete pages, then the current page's.
DEVICE void write_candidates(const Shared &s, const Row &row, const Params &p, int num, int num_current, i64 token, int tid) {
    i64 pair = token * p.num_kv_heads + row.head;
#pragma unroll 1
    for (int i = tid; i < num + num_current; i += THREADS) {
        int unit = i < num ? s.candidates[i] : row.num_units + i - num;
        int place = i < num ? place_in(s.candidates, num, unit) : i;
        p.candidates[pair * p.max_candidates + place] =
            (page_id(s, row, unit / UNITS_PER_PAGE) * p.num_kv_heads + row.head) * UNITS_PER_PAGE + unit % UNITS_PER_PAGE;
    }
    if (tid == 0) p.candidate_count[pair] = num + num_current;
}
#endif

// Ask for the tokens of a warp's `k`-th step, which are of one block.
DEVICE void issue_step(const Shared &s, const Row &row, const Tokens &n, int k, int warp, int lane) {
    int t = (n.start + k) * TOKENS;
    int block = listed_block(s, row, n, t / ATTENDED);
    int r = lane / STATE_LANES;
    const u16 *from = row.kv + page_id(s, row, block / ATTENDED_PER_PAGE) * row.page_stride +
                      (block % ATTENDED_PER_PAGE * ATTENDED + t % ATTENDED + r) * ROW;
    char *to = s.ring + warp * RING_BYTES + (k % STEPS * TOKENS + r) * STRIDE + lane % STATE_LANES * 16;
#pragma unroll
    for (int j = 0; j < TOKENS; j += STATE_ROWS_AT_ONCE)
        copy_in(to + j * STRIDE, from + j * ROW + lane % STATE_LANES * 8);
}

// One warp's partial result: numerators in its ring `[COLUMNS][PART_STRIDE]`, scalars in `s.warp [warp][SCALARS][GP]`.
DEVICE void attend(
    const Shared &s, const Row &row, const Params &p, const Tokens &n, const StateRead &state, bool reads, int warp, int lane) {
    char *ring = s.ring + warp * RING_BYTES;
    int matrix = lane / 8, r = lane % 8;
    u32 q[D / 16][2];  // heads are the columns of the right side of K q
#pragma unroll
    for (int i = 0; i < D / 16; i += 2) {
        u32 x[4];
        load_tiles(x, s.query + r * QUERY_STRIDE + i * 16 + matrix * 8);
#pragma unroll
        for (int j = 0; j < 4; j++) q[i + j / 2][j % 2] = x[j];
    }
    // A lane has two heads, `column + j` modulo GP, of the tokens `lane / 4` and `lane / 4 + 8`.
    int column = lane % 4 * 2;
    float top[2], sum[2], z[2];
#pragma unroll
    for (int j = 0; j < 2; j++) {
        top[j] = -infinity();
        sum[j] = z[j] = 0.0f;
    }
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
        float products[2][4] = {};  // [tokens, heads], in two sums that do not wait for each other
#pragma unroll
        for (int i = 0; i < D / 16; i++) {
            u32 x[4];
            load_tiles(x, rows + (matrix % 2 * 8 + r) * STRIDE + i * 32 + matrix / 2 * 16);
            multiply(products[i % 2], x[0], x[1], x[2], x[3], q[i][0], q[i][1]);
        }
        float logit[2][2], best[2], decay[2], weight[2][2];  // [half of the tokens][head], [head]
        bool moved = false;
#pragma unroll
        for (int j = 0; j < 2; j++) {
            best[j] = top[j];
#pragma unroll
            for (int t = 0; t < 2; t++) {
                bool exists = first + t * 8 + lane / 4 < n.limit;
                logit[t][j] = exists ? (products[0][t * 2 + j] + products[1][t * 2 + j]) * p.scale : -infinity();
                best[j] = max_(best[j], logit[t][j]);
            }
        }
#pragma unroll
        for (int other = 4; other < 32; other *= 2)
#pragma unroll
            for (int j = 0; j < 2; j++) best[j] = max_(best[j], shuffle_xor(best[j], other));
#pragma unroll
        for (int j = 0; j < 2; j++) {
            decay[j] = exp_(top[j] - best[j]);
            moved = moved || best[j] > top[j];
            top[j] = best[j];
#pragma unroll
            for (int t = 0; t < 2; t++) weight[t][j] = exp_(logit[t][j] - best[j]);
            sum[j] = sum[j] * decay[j] + (weight[0][j] + weight[1][j]);
            if (subtract) z[j] += logit[0][j] + logit[1][j];
            if (column + j >= GP) decay[j] = 1.0f;  // columns of softmax weights are the first ones
        }
        if (ballot(moved)) {
#pragma unroll
            for (int i = 0; i < D / 16; i++)
#pragma unroll
                for (int j = 0; j < 4; j++) out[i][0][j] *= decay[j % 2];
        }
        u32 b[COLUMN_TILES][2];  // the right side of V^T W
#pragma unroll
        for (int c = 0; c < COLUMN_TILES; c++)
#pragma unroll
            for (int t = 0; t < 2; t++) {
                float x[2];
#pragma unroll
                for (int j = 0; j < 2; j++) {
                    int kind = (c * 8 + column + j) / GP;
                    x[j] = 0.0f;
                    if (kind == 0) {
                        x[j] = weight[t][j];
                    } else if (RESIDUAL && subtract && c * 8 + column + j < COLUMNS) {
                        float upper = element(rounded(logit[t][j]));
                        x[j] = kind == 1 ? upper : kind == 2 ? logit[t][j] - upper : 1.0f;
                    }
                }
                b[c][t] = transposed(two(x[0], x[1]));
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
    for (int other = 4; other < 32; other *= 2)
#pragma unroll
        for (int j = 0; j < 2; j++) {
            sum[j] += shuffle_xor(sum[j], other);
            z[j] += shuffle_xor(z[j], other);
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
        for (int h = 0; h < GP; h++) {
            float of_state = state.z[h];
#pragma unroll
            for (int j = 0; j < 2; j++) z[j] -= column + j == h ? of_state : 0.0f;
        }
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
#pragma unroll
    for (int j = 0; j < 2; j++) {
        if (lane < 4 && column + j < GP) {
            s.warp[warp * SCALARS * GP + column + j] = top[j];
            s.warp[(warp * SCALARS + 1) * GP + column + j] = sum[j];
            s.warp[(warp * SCALARS + 2) * GP + column + j] = z[j];
        }
    }
}

// Mass of this block's units that were not selected, of some of them the share that was not, from the normaliser of the scores, which are no smaller.
DEVICE void mass_of_rest(const Shared &s, int num, int warp, int lane) {
    float anchor = s.lse[lane % GP], sum = 0.0f;
#pragma unroll 1
    for (int i = warp * 32 + lane; i < num * GP; i += THREADS) {
        float left = FINE ? 1.0f - (float)s.keys[i / GP] * (1.0f / FINE_PER_UNIT) : 1.0f;
        sum += left * exp_(s.mass[i] - anchor);
    }
#pragma unroll
    for (int other = GP; other < 32; other *= 2) sum += shuffle_xor(sum, other);
    if (lane < GP) s.warp[(warp * SCALARS + 3) * GP + lane] = sum;
}

// The warps' partial results, merged, to the blocks that have the columns; this block's scalars to all.
DEVICE void merge_warps(const Shared &s, bool reads, int rank, int tid) {
    sync_block();
    for (int e = tid; e < PART_ROWS * D / 4; e += THREADS) {
        int r = e / (D / 4), quad = e % (D / 4);
        float sum[4] = {}, top = -infinity();
        if (r < GP)
#pragma unroll
            for (int w = 0; w < WARPS; w++) top = max_(top, s.warp[w * SCALARS * GP + r]);
#pragma unroll
        for (int w = 0; w < WARPS; w++) {
            const float *part = (const float *)(s.ring + w * RING_BYTES) + quad * 4;
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
        int owner = ((quad + 1) * BLOCKS - 1) / (D / 4);
        Four *to = (Four *)s.part + (rank * PART_ROWS + r) * SLICE + quad - first_of(D / 4, owner);
        *of_block(to, owner) = {{sum[0], sum[1], sum[2], sum[3]}};
    }
    for (int i = tid; i < BLOCKS * GP; i += THREADS) {
        int h = i % GP;
        float top = -infinity(), sum = 0.0f, z = 0.0f, mass = 0.0f;
#pragma unroll
        for (int w = 0; w < WARPS; w++) top = max_(top, s.warp[w * SCALARS * GP + h]);
#pragma unroll
        for (int w = 0; w < WARPS; w++) {
            const float *x = s.warp + w * SCALARS * GP + h;
            sum += x[GP] * exp_(x[0] - finite_or_0(top));
            z += x[2 * GP];
            if (RESIDUAL && reads) mass += x[3 * GP];
        }
        float *to = of_block(s.scalars + rank * SCALARS * GP + h, i / GP);
        to[0] = top;
        to[GP] = sum;
        to[2 * GP] = z;
        to[3 * GP] = mass;
    }
}

// Merge what the blocks of the cluster sent, combine, and write this block's columns of the output.
DEVICE void merge_blocks(
    const Shared &s, const Row &row, const Params &p, i64 token, int num_rest, int rank, int tid) {
    float *weight = s.final_;                   // [MAX_CLUSTER][GP]: of a block's exact part
    float *share = s.final_ + MAX_CLUSTER * GP; // [GP]: of the tail in the output
    float *mean_qk = share + GP;                // [GP]
    // The residual's sums are those of the selected tokens less those of the state.
    float per_token = num_rest > 0 ? -1.0f / (float)num_rest : 0.0f;
    constexpr int WIDTH = next_power(BLOCKS);
    if (tid < max_(32, WIDTH * GP)) {
        int h = tid / WIDTH % GP, b = tid % WIDTH;  // a lane a block
        const float *x = s.scalars + b * SCALARS * GP + h;
        bool exists = b < BLOCKS;
        float mine = exists ? x[0] : -infinity();
        float top = mine;
#pragma unroll
        for (int other = 1; other < WIDTH; other *= 2) top = max_(top, shuffle_xor(top, other));
        float decay = exp_(mine - top);
        float sum = exists ? decay * x[GP] : 0.0f, z = exists ? x[2 * GP] : 0.0f, mass = exists ? x[3 * GP] : 0.0f;
#pragma unroll
        for (int other = 1; other < WIDTH; other *= 2) {
            sum += shuffle_xor(sum, other);
            z += shuffle_xor(z, other);
            mass += shuffle_xor(mass, other);
        }
        weight[b * GP + h] = decay * reciprocal(sum);
        float gain = s.gain[h], tail = 0.0f;
        if (num_rest > 0 && gain > 0.0f && mass > 0.0f)
            tail = reciprocal(1.0f + exp_(top - s.lse[h]) * sum * reciprocal(max_(mass * gain, 1e-30f)));
        share[h] = tail;
        mean_qk[h] = z * per_token;
    }
    sync_block();
    constexpr int LANES = BLOCKS < 3 ? BLOCKS : 4;  // that add up an element together
    int first = first_of(D / 4, rank) * 4, columns = first_of(D / 4, rank + 1) * 4 - first;
    int lane = tid % LANES;
    for (int e = tid / LANES; e < ceil_div(GROUP * SLICE * 4, THREADS / LANES) * (THREADS / LANES); e += THREADS / LANES) {
        int h = min_(e / (SLICE * 4), GROUP - 1), column = e % (SLICE * 4);
        float exact = 0.0f, rest = 0.0f, v = 0.0f;
#pragma unroll
        for (int i = 0; i < (BLOCKS + LANES - 1) / LANES; i++) {
            int b = lane + i * LANES;
            if (column < columns && b < BLOCKS) {
                const float *part = s.part + b * PART_ROWS * SLICE * 4 + column;
                exact += weight[b * GP + h] * part[h * SLICE * 4];
                if (RESIDUAL && num_rest > 0) {
                    rest += part[(GP + h) * SLICE * 4];
                    v += part[2 * GP * SLICE * 4];
                }
            }
        }
#pragma unroll
        for (int other = 1; other < LANES; other *= 2) {
            exact += shuffle_xor(exact, other);
            rest += shuffle_xor(rest, other);
            v += shuffle_xor(v, other);
        }
        if (lane == 0 && column < columns && e < GROUP * SLICE * 4) {
            float out = exact;
            if (RESIDUAL && share[h] > 0.0f) {
                float mean_v = v * per_token;
                float tail = mean_v + p.residual_scale * (rest * per_token - mean_qk[h] * mean_v);
                out = exact + share[h] * (tail - exact);
            }
            p.output[token * p.output_token_stride + (row.head * GROUP + h) * p.output_head_stride + first + column] = rounded(out);
        }
    }
}

// q, and q^2 in two parts of the type in which they meet the statistics: in float16 normalised to its largest element, so that
// float16 holds it. Warp `w` has head `w % GP`.
DEVICE void load_query(const Shared &s, const Params &p, i64 token, int head, int warp, int lane) {
    int h = warp % GP;
    u16 *q = s.query + warp * QUERY_STRIDE;
    const u16 *from = p.query + token * p.query_token_stride + (head * GROUP + h) * p.query_head_stride;
    // A lane has neighbouring elements.
    constexpr int EACH = D / 32;
    struct alignas(2 * EACH) Elements { u16 x[EACH]; } raw = {}, own = {}, upper = {}, lower = {};
    if (h < GROUP) raw = *(const Elements *)(from + lane * EACH);
    float peak = 1024.0f;
#if FP16 || FP8
    peak = 1e-30f;
#pragma unroll
    for (int i = 0; i < EACH; i++) {
        float x = element(raw.x[i]) * p.scale;
        peak = max_(peak, x * x);
    }
#pragma unroll
    for (int other = 1; other < 32; other *= 2) peak = max_(peak, shuffle_xor(peak, other));
#endif
    float to_1024 = 1024.0f / peak;
#pragma unroll
    for (int i = 0; i < EACH; i++) {
        Forms forms = forms_of(raw.x[i], p.scale, to_1024);
        own.x[i] = forms.own;
        upper.x[i] = forms.upper;
        lower.x[i] = forms.lower;
        if (warp < GP) s.scaled[h * D + lane * EACH + i] = element(raw.x[i]) * p.scale;
    }
#if FINE
    // A step is a 32512th of the head's largest element.
    float largest = 1e-30f;
#pragma unroll
    for (int i = 0; i < EACH; i++) largest = larger(largest, larger(element(raw.x[i]), -element(raw.x[i])));
#pragma unroll
    for (int other = 1; other < 32; other *= 2) largest = larger(largest, shuffle_xor(largest, other));
    if (warp < HEAD_TILES * 4) {
        char *to = s.bytes + warp * 2 * BYTES_STRIDE + lane * EACH / 8 * 8;
#pragma unroll
        for (int i = 0; i < EACH; i++) {
            int steps = as_int(element(raw.x[i]) * (32512.0f / largest) + INTEGER_ZERO) - INTEGER, upper = (steps + 128) >> 8;
            int channel = (lane * EACH + i) % 8, at = channel % 2 * 4 + channel / 2;
            to[at] = (char)upper;
            to[at + BYTES_STRIDE] = (char)(steps - upper * 256);
        }
        if (lane == 0 && warp < GP) s.step[warp] = largest * (p.scale / 32512.0f);
    }
#endif
    *(Elements *)(q + lane * EACH) = raw;
    *(Elements *)(q + 8 * QUERY_STRIDE + lane * EACH) = upper;
    *(Elements *)(q + 16 * QUERY_STRIDE + lane * EACH) = lower;
    if (OWN_QUERY) *(Elements *)(q + 24 * QUERY_STRIDE + lane * EACH) = own;
    if (warp < GP && lane == 0) {
        s.restore[h] = peak * (1.0f / 1024.0f);
        s.gain[h] = h < GROUP ? p.gain[head * GROUP + h] : 0.0f;
    }
}

// Where scores are made ahead a block of that launch, 128 threads of up to 168 registers, lives beside one of this: the
// compiler is told of more threads than there are, so that it takes no more than 168 registers each here, too.
constexpr int BOUND = SCORED ? 336 : THREADS;

// Grid (blocks of a cluster, G, rows), clusters of (gridDim.x, 1, 1).
KERNEL(BOUND, 1) spla_fused_decode(KERNEL_PARAMS) {
    int tid = thread_id(), warp = tid / 32, lane = tid % 32;
    int rank = block_x(), head = block_y();
    Shared s = carve(shared_memory, p);
    if (tid < BIN_WORDS) s.bins[tid] = 0;

    // Lengths and tables are the step's and stand long before the launch that is waited for.
    i64 row_index = block_z();
    int seq_len = p.seq_lens[row_index];
    i64 token = p.query_start_loc[row_index];
    bool exists = seq_len > 0 && p.query_start_loc[row_index + 1] > token;
    if (!exists) {
        // Padding. Its output row is ours to clear only behind the tokens of all real rows.
        grid_wait();
        if (rank == 0 && row_index >= p.query_start_loc[p.num_rows])
#pragma unroll 1
            for (int e = tid; e < GROUP * D; e += THREADS)
                p.output[row_index * p.output_token_stride + (head * GROUP + e / D) * p.output_head_stride + e % D] = 0;
        return;
    }
    arrive_at_cluster();
    Row row;
    row.pages = p.block_table + row_index * p.block_table_stride;
#pragma unroll
    for (int b = 0; b < NUM_BLOCKS; b++) row.blocks[b] = max_(p.state_table[row_index * p.state_table_stride + b], 0);
    row.kv = p.kv + head * p.head_stride;
    row.state = p.state + head * p.state_head_stride;
    row.position = seq_len - 1;
    row.head = head;
    row.page_stride = p.page_stride;
    row.page_step = (u32)(p.page_stride / (STEP / 2));
    row.state_block_stride = p.state_block_stride;
    row.last_page = p.last_page;
    int target = row.position / PAGE;  // complete pages
    row.num_units = target * UNITS_PER_PAGE;
    int num_current = row.position % PAGE / UNIT + 1;  // units of the current page, the last one partly filled
    int complete_blocks = row.num_units * FINE_PER_UNIT, current_blocks = row.position % PAGE / ATTENDED + 1;
    Tokens n;
    n.all = complete_blocks + current_blocks <= p.whole * FINE_PER_UNIT;
    n.complete = n.all ? complete_blocks : p.budget * FINE_PER_UNIT - current_blocks;
    bool reads = !n.all;  // some units are left out
    int share = share_of(row.num_units);
    int first = min_(rank * share, row.num_units);
    int num = min_(share, row.num_units - first);
    int tiles = reads && !SCORED ? tiles_of(num, warp) : 0;
    if (TABLE)
        for (int i = tid; i <= target; i += THREADS) copy_word(s.table + i, row.pages + i);
    close_copies();
#if !SCORED
    // A lane a unit of the first tiles.
    constexpr int AT_ONCE = 32 / TILE;
    u32 places[STAGES / AT_ONCE];
#pragma unroll
    for (int i = 0; i < STAGES / AT_ONCE; i++) {
        int k = i * AT_ONCE + lane / TILE;
        int unit = unit_of(first, num, warp, k, lane % TILE);
        places[i] = k < tiles ? place_of(row, within_cache(row, row.pages[unit / UNITS_PER_PAGE]), unit) : 0;
    }
#endif
    int last_page = 0, page_before = 0;
    if (RESIDUAL && target > 0 && warp == WARPS - 1) {
        last_page = row.pages[target - 1];
        page_before = row.pages[max_(target - 2, 0)];
    }
    if (RESIDUAL && reads) prefetch_state(row, rank, tid);
#if SCORED
    grid_wait();
    grid_launch();
    if (reads) fetch_scores(s, p, row_index * p.num_kv_heads + head, first, num, tid);
    close_copies();
#else
    // Statistics that stand already are asked for before the launch ahead has ended. Its own are at most those of the last
    // complete page of a row, which are in the warp's last tile.
    // One loop, a turn of which waits, because code that runs once costs its fetching.
    int standing = 0;  // tiles
    if (p.early)
        while (standing < min_(tiles, STAGES) &&
               first + min_((warp + standing * WARPS + 1) * TILE, num) <= row.num_units - UNITS_PER_PAGE)
            standing++;
#pragma unroll 1
    for (int k = 0; k <= STAGES; k++) {
        if (k == standing) {
            grid_wait();
            grid_launch();  // so that whoever is launched next knows all but this launch to have ended
        }
        if (k == STAGES) break;
        u32 place = places[0];
#pragma unroll
        for (int i = 1; i < STAGES / AT_ONCE; i++)
            if (k / AT_ONCE == i) place = places[i];
        if (k < tiles) issue_tile(s, row, k, place, k % AT_ONCE * TILE, warp, lane);
        close_copies();
    }
#endif
    Trust trust;
    if (RESIDUAL && target > 0 && warp == WARPS - 1) trust = ask_trust(row, last_page, page_before, lane);
    load_query(s, p, token, head, warp, lane);
    wait_copies<SCORED ? 0 : STAGES>();  // for the block table, and scores that were made ahead
    sync_block();
#if SCORED
    if (reads) norms_of_scores(s, num, warp, lane);
#else
    if (reads) score_units(s, row, p, first, num, warp, lane);
#endif
    int covered = target;
    if (RESIDUAL && target > 0 && warp == WARPS - 1) {
        covered = trusted_pages(trust, row, target, lane);
        if (lane == 0) s.flags[0] = covered;
    }
    sync_block();
    sync_warp();
    wait_for_cluster();  // every block has begun, so that its shared memory may be written
    if (reads) share_norms(s, rank, tid);
    if (RESIDUAL && target > 0) {
        covered = s.flags[0];
        if (covered < target) fold(s, row, rank, covered, target, warp, lane);
    }
    sync_cluster();
    // All blocks have read the headers.
    if (RESIDUAL && warp == 0 && rank == 0 && covered < target) write_headers(row, target, lane);
    StateRead state;
    int candidates = min_(row.num_units, p.max_candidates - num_current);  // of complete pages
    if (reads) {
        StateAhead ahead;
        auto ask = [&]() {
            if (RESIDUAL) ahead = ask_state(row, rank, warp, lane);
        };
        auto read = [&]() {
            if (RESIDUAL) read_state(state, ahead, s, row, rank, warp, lane);
        };
        Forced forced = forced_units(row, p);
        int num_forced = forced_before(forced, row.num_units);
        if (!FINE) ask();
        // One level, or the first of two, and then the second: one loop, because code takes time to fetch.
        bool fine = false;
#pragma unroll 1
        for (;; fine = true) {
            // The second each block does for itself, which takes less time than waiting for the others.
            int fine_blocks = candidates * FINE_PER_UNIT, number = fine ? fine_blocks : num;
            auto name = [&](int i) {
                return fine ? s.candidates[i / FINE_PER_UNIT] * FINE_PER_UNIT + i % FINE_PER_UNIT : first + i;
            };
            auto unit = [&](int i) { return fine ? s.candidates[i / FINE_PER_UNIT] : first + i; };
            u32 *keys = fine ? s.fine_keys : s.keys;
            make_keys(
                s, fine ? s.warp : s.norms, fine ? WARPS : BLOCKS, keys, fine ? nullptr : s.lse, forced, number, tid, unit);
            if (fine || !FINE || candidates < row.num_units)
                select(
                    s, keys, num_forced * (fine ? FINE_PER_UNIT : 1), fine ? 0 : forced_before(forced, first),
                    FINE && !fine ? candidates : n.complete, number, fine, rank, tid, name,
                    [&](int i) {
                        if (RESIDUAL && !FINE)
#pragma unroll
                            for (int h = 0; h < GP; h++) s.mass[i * GP + h] = -infinity();
                    },
                    [&]() {
                        if (fine || !FINE) read();
                    });
            else
                sync_cluster();  // all blocks have read scores of units
            if (fine || !FINE) break;
#if FINE
            for (int i = tid; i < candidates; i += THREADS) s.candidates[i] = candidates < row.num_units ? s.list[i] : i;
            if (tid < BIN_WORDS) s.bins[tid] = 0;
            for (int i = tid; i < num; i += THREADS) s.keys[i] = 0;
            sync_block();
            int of_block = ceil_div(candidates, BLOCKS), first_candidate = min_(rank * of_block, candidates);
            score_fine(s, row, p, first_candidate, min_(of_block, candidates - first_candidate), warp, lane);
            sync_cluster();
            ask();
            norms_of_scores(s, fine_blocks, warp, lane);
            sync_block();
#endif
        }
#if FINE
        arrive_at_cluster();  // this block has read scores of fine blocks
        if (RESIDUAL)
            for (int i = tid; i < n.complete; i += THREADS) {
                int own = s.list[i] / FINE_PER_UNIT - first;
                if (own >= 0 && own < num) add_to(s.keys + own, 1);
            }
#endif
    }
    n.covered = n.complete * ATTENDED;
    n.limit = (n.complete + current_blocks - 1) * ATTENDED + row.position % ATTENDED + 1;
    int steps = ceil_div(n.limit, TOKENS);
    int per_warp = ceil_div(steps, BLOCKS * WARPS);
    n.start = min_((rank * WARPS + warp) * per_warp, steps);
    n.stop = min_(n.start + per_warp, steps);
#pragma unroll
    for (int k = 0; k < STEPS; k++) {
        if (n.start + k < n.stop) issue_step(s, row, n, k, warp, lane);
        close_copies();
    }
    if (FINE && RESIDUAL && reads) sync_block();  // all selected blocks have been counted
    if (RESIDUAL && reads) mass_of_rest(s, num, warp, lane);
    if (rank == BLOCKS - 1) write_table(s, row, p, n, token, tid);  // while tokens are on their way
#if FINE
    if (rank == 0 && reads) write_candidates(s, row, p, candidates, num_current, token, tid);
#endif
    attend(s, row, p, n, state, reads, warp, lane);
    if (FINE && reads) wait_for_cluster();  // all blocks have read scores, whose place partial results take
    merge_warps(s, reads, rank, tid);
    sync_cluster();  // nobody reads or writes another block's shared memory from here on
    merge_blocks(s, row, p, token, reads ? row.num_units * UNIT - n.complete * ATTENDED : 0, rank, tid);
}

#if SCORED
// ---------------------------------------------------------------------------------- scores ahead of the launch above

// Scores of all units of all rows, for long rows in small batches: the clusters above of one row leave half of the
// multiprocessors idle, and each takes in so much a microsecond and no more. A warp takes 16 units of one kv head, the warps of
// a block the same units of other heads, whose statistics stand near. They go from memory to registers, so that the launch above,
// which waits for this one, finds shared memory free.
//
// Floor, bytes a (row, kv head): `2 D` elements, or bytes, and `8 GP` a unit, 4 a page. FLOP: `4 GROUP D` a unit.
//
// Grid (blocks that share a row, ceil(G / SCORE_WARPS), rows).
constexpr int SCORE_WARPS = 4;            // `kernels/gpu/decode/fused.py` has the same
constexpr int CHUNK = FP8 ? 64 : 32;      // elements of a half statistic that four lanes load at once, 16 bytes each
constexpr int CHUNKS = D / CHUNK;         // of a half statistic
constexpr int EACH = CHUNK / 4;           // elements of a lane

// What a lane holds of a tile: 16 bytes of each chunk of the units `lane / 4` and `lane / 4 + 8`, means and variances.
struct Tile {
    Words x[2][2][CHUNKS];  // [unit][half][chunk]
};

DEVICE void load_tile(Tile &out, const Row &row, u32 place, int lane) {
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const char *from = (const char *)row.kv + (u64)(u32)shuffle((int)place, lane / 4 + i * 8) * STEP + lane % 4 * 16;
#pragma unroll
        for (int half = 0; half < 2; half++)
#pragma unroll
            for (int c = 0; c < CHUNKS; c++)
                load_once(out.x[i][half][c].x, from + half * (STATISTIC_BYTES / 2) + c * 64);
    }
}

KERNEL(SCORE_WARPS * 32, 3) spla_score_units(KERNEL_PARAMS) {
    int tid = thread_id(), warp = tid / 32, lane = tid % 32;
    grid_launch();  // the launch above waits for the end of this one before it reads anything of it
    i64 row_index = block_z();
    int head = block_y() * SCORE_WARPS + warp;
    int seq_len = p.seq_lens[row_index];
    i64 token = p.query_start_loc[row_index];
    bool exists = seq_len > 0 && p.query_start_loc[row_index + 1] > token && head < p.num_kv_heads;
    Row row;
    row.pages = p.block_table + row_index * p.block_table_stride;
    row.kv = p.kv + head * p.head_stride;
    row.page_step = (u32)(p.page_stride / (STEP / 2));
    row.last_page = p.last_page;
    int position = seq_len - 1;
    row.num_units = exists ? position / PAGE * UNITS_PER_PAGE : 0;
    bool reads = row.num_units + position % PAGE / UNIT + 1 > p.whole;  // some units are left out
    int tiles = exists && reads ? ceil_div(row.num_units, TILE) : 0;
    int step = block_count(), tile = block_x();
    auto place = [&](int k) {
        int unit = min_(k * TILE + lane % TILE, row.num_units - 1);
        return place_of(row, within_cache(row, row.pages[unit / UNITS_PER_PAGE]), unit);
    };
    Tile x;
    // Of the launch ahead are at most the statistics of the last complete page (`early`).
    bool standing = p.early && tile < tiles && (tile + 1) * TILE <= row.num_units - UNITS_PER_PAGE;
    u32 next = tile < tiles ? place(tile) : 0;
    if (standing) load_tile(x, row, next, lane);
    grid_wait();
    if (tile >= tiles) return;
    if (!standing) load_tile(x, row, next, lane);

    // Heads are the columns: a lane has the elements of column `lane / 4` that meet those of units that it has.
    constexpr bool QUEST_ = SELECTOR == QUEST, OWN_PRODUCT = GP > 4 && !QUEST_;
    int column = lane / 4, h = column % GP;
    const u16 *from = p.query + token * p.query_token_stride + (head * GROUP + min_(h, GROUP - 1)) * p.query_head_stride;
    u32 raw[CHUNKS][EACH / 2];
    float peak = 1024.0f;
#pragma unroll
    for (int c = 0; c < CHUNKS; c++)
#pragma unroll
        for (int i = 0; i < EACH / 8; i++) {
            Words four = *(const Words *)(from + c * CHUNK + lane % 4 * EACH + i * 8);
#pragma unroll
            for (int j = 0; j < 4; j++) raw[c][i * 4 + j] = h < GROUP ? four.x[j] : 0;
        }
#if FP16 || FP8
    peak = 1e-30f;
#pragma unroll
    for (int c = 0; c < CHUNKS; c++)
#pragma unroll
        for (int i = 0; i < EACH / 2; i++) {
            float a = low(raw[c][i]) * p.scale, b = high(raw[c][i]) * p.scale;
            peak = max_(peak, max_(a * a, b * b));
        }
#pragma unroll
    for (int other = 1; other < 4; other *= 2) peak = max_(peak, shuffle_xor(peak, other));
#endif
    u32 q[CHUNKS][EACH / 2], square[CHUNKS][EACH / 2], rest[OWN_PRODUCT ? CHUNKS : 1][EACH / 2];
    bool lower = QUEST_ || (GP <= 4 && column >= 4);
#pragma unroll
    for (int c = 0; c < CHUNKS; c++)
#pragma unroll
        for (int i = 0; i < EACH / 2; i++) {
            Forms a = forms_of((u16)raw[c][i], p.scale, 1024.0f / peak), b = forms_of((u16)(raw[c][i] >> 16), p.scale, 1024.0f / peak);
            auto pack = [](u16 first, u16 second) { return (u32)first | (u32)second << 16; };
            q[c][i] = QUEST_ ? pack(a.upper, b.upper) : pack(a.own, b.own);
            square[c][i] = lower ? pack(a.lower, b.lower) : pack(a.upper, b.upper);
            if constexpr (OWN_PRODUCT) rest[c][i] = pack(a.lower, b.lower);
        }
    int half = half_of(lane), first_head = head_of(lane);
    float restore[2];
#pragma unroll
    for (int j = 0; j < 2; j++) restore[j] = shuffle(peak * (1.0f / 1024.0f), (first_head + j) % GP * 4);

    i64 out = (row_index * p.num_kv_heads + head) * p.max_units;
#pragma unroll 1
    for (int k = tile; k < tiles; k += step) {
        if (k + step < tiles) next = place(k + step);
        float linear[4] = {}, second[4] = {};
#pragma unroll
        for (int c = 0; c < CHUNKS; c++)
#pragma unroll
            for (int w = 0; w < EACH / 4; w++) {
                const u32 (&b)[EACH / 2] = q[c], (&b2)[EACH / 2] = square[c];
#if FP8
                // A word has four elements, two pairs.
                u32 one = x.x[0][0][c].x[w], other = x.x[1][0][c].x[w];
                multiply_half(
                    linear, e4m3_lower(one), e4m3_lower(other), e4m3_upper(one), e4m3_upper(other), b[w * 2], b[w * 2 + 1]);
                one = x.x[0][1][c].x[w], other = x.x[1][1][c].x[w];
                u32 y0 = second_lower(one), y1 = second_lower(other), y2 = second_upper(one), y3 = second_upper(other);
                multiply_half(second, y0, y1, y2, y3, b2[w * 2], b2[w * 2 + 1]);
                if constexpr (OWN_PRODUCT) multiply_half(second, y0, y1, y2, y3, rest[c][w * 2], rest[c][w * 2 + 1]);
#else
                const Words &m = x.x[0][0][c], &m8 = x.x[1][0][c], &v = x.x[0][1][c], &v8 = x.x[1][1][c];
                multiply(linear, m.x[w * 2], m8.x[w * 2], m.x[w * 2 + 1], m8.x[w * 2 + 1], b[w * 2], b[w * 2 + 1]);
                multiply(second, v.x[w * 2], v8.x[w * 2], v.x[w * 2 + 1], v8.x[w * 2 + 1], b2[w * 2], b2[w * 2 + 1]);
                if constexpr (OWN_PRODUCT)
                    multiply(
                        second, v.x[w * 2], v8.x[w * 2], v.x[w * 2 + 1], v8.x[w * 2 + 1], rest[c][w * 2], rest[c][w * 2 + 1]);
#endif
            }
        if (k + step < tiles) load_tile(x, row, next, lane);
#pragma unroll
        for (int i = 0; i < HALVES; i++) {
            int unit = k * TILE + lane / 4 + (half + i) * 8;
            Score of[2];
#pragma unroll
            for (int j = 0; j < 2; j++) of[j] = score_of(linear, second, half, i, j, restore[j], p.scale);
#pragma unroll
            for (int j = 0; j < 2; j++)
                if (unit < row.num_units && first_head + j < GP) {
                    i64 at = (out + unit) * GP + first_head + j;
                    p.scores[at] = of[j].score;
                    if (RESIDUAL && SELECTOR != TAYLOR2) p.mass[at] = of[j].mass;
                }
        }
    }
}
#endif

}  // namespace spla
