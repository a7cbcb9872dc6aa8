// Runs `kernels/gpu/decode/fused.cu` on a CPU: every CUDA thread is a fiber, every primitive of the hardware that the source
// uses has a plain meaning here. Shared memory starts as NaN; asynchronous copies arrive as late as the wait for them, their
// target NaN until then; threads that wait for each other in vain end the program.

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>

#define SPLA_EMULATE
#define DEVICE static inline

// What a call has to find as it was, on the stack; then the other stack. `swapcontext` asks the system for signals, too,
// which takes most of an emulated launch.
extern "C" __attribute__((visibility("hidden"))) void emulator_switch(void **from, void *to);
asm(R"(
.text
.type emulator_switch, @function
emulator_switch:
    endbr64
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
.size emulator_switch, . - emulator_switch
)");

namespace emulator {

struct Meeting {  // a barrier of `total` threads
    int total = 0, arrived = 0, generation = 0;
};

struct Warp {
    Meeting meeting, shuffles;
    unsigned slots[2][32];
};

struct Block {
    int rank;
    std::vector<char> shared;
    char *base;
    Meeting all;
    std::vector<Warp> warps;
};

struct Copy {
    void *to;
    const void *from;
    size_t size;
};

struct Fiber {
    void *top;  // of its stack, while another one runs
    Block *block;
    int tid;
    bool done = false;
    std::vector<Copy> open;                 // asynchronous copies
    std::vector<std::vector<Copy>> closed;  // in groups
};

static Fiber *current;
static void *scheduler;  // the top of its stack
static std::vector<std::unique_ptr<Block>> blocks;
static Meeting cluster;
static int first_block, num_blocks_x, head, row;
static long progress;

static void yield() { emulator_switch(&current->top, scheduler); }

static void meet(Meeting &m) {
    int generation = m.generation;
    progress++;
    if (++m.arrived == m.total) {
        m.arrived = 0;
        m.generation++;
    } else {
        while (m.generation == generation) yield();
    }
}

static Warp &warp() { return current->block->warps[current->tid / 32]; }

template <typename T> static T exchange(T x, int from) {
    Warp &w = warp();
    int buffer = w.shuffles.generation & 1;
    std::memcpy(&w.slots[buffer][current->tid % 32], &x, 4);
    meet(w.shuffles);
    T out;
    std::memcpy(&out, &w.slots[buffer][from], 4);
    return out;
}

}  // namespace emulator

static int thread_id() { return emulator::current->tid; }
static int block_x() { return emulator::first_block + emulator::current->block->rank; }
static int block_y() { return emulator::head; }
static int block_z() { return emulator::row; }
static int block_count() { return emulator::num_blocks_x; }
static float shuffle_xor(float x, int mask) { return emulator::exchange(x, (thread_id() % 32) ^ mask); }
static float shuffle(float x, int lane) { return emulator::exchange(x, lane); }

template <typename F> static unsigned over_warp(unsigned x, F f) {
    emulator::Warp &w = emulator::warp();
    int buffer = w.shuffles.generation & 1;
    w.slots[buffer][thread_id() % 32] = x;
    emulator::meet(w.shuffles);
    unsigned out = w.slots[buffer][0];
    for (int i = 1; i < 32; i++) out = f(out, w.slots[buffer][i]);
    return out;
}
static unsigned ballot(bool x) {
    return over_warp(x ? 1u << thread_id() % 32 : 0u, [](unsigned a, unsigned b) { return a | b; });
}
static unsigned warp_sum(unsigned x) { return over_warp(x, [](unsigned a, unsigned b) { return a + b; }); }
static int shuffle(int x, int lane) { return emulator::exchange(x, lane); }
static unsigned shuffle_up(unsigned x, int by) {
    int lane = thread_id() % 32;
    return emulator::exchange(x, lane >= by ? lane - by : lane);
}
static int leading_zeros(unsigned x) { return x ? __builtin_clz(x) : 32; }
static unsigned add_to(unsigned *p, unsigned x) {
    unsigned before = *p;
    *p += x;
    return before;
}
static const char *opaque(const char *p) { return p; }
static void prefetch(const void *p) { *(volatile const char *)p; }
static int popcount(unsigned x) { return __builtin_popcount(x); }
static void sync_warp() { emulator::meet(emulator::warp().meeting); }
static void sync_block() { emulator::meet(emulator::current->block->all); }
static void arrive_at_cluster() {}
static void wait_for_cluster() { emulator::meet(emulator::cluster); }
template <typename T> static T *of_block(T *p, int rank) {
    return (T *)(emulator::blocks[rank]->base + ((char *)p - emulator::current->block->base));
}
static void grid_wait() {}
static void grid_launch() {}
static float exp2_(float x) { return std::exp2(x); }
static float log2_(float x) { return std::log2(x); }
static float reciprocal(float x) { return 1.0f / x; }
static float larger(float a, float b) { return std::fmax(a, b); }
static float sqrt_(float x) { return std::sqrt(x); }
static int as_int(float x) { int y; std::memcpy(&y, &x, 4); return y; }
static float as_float(unsigned x) { float y; std::memcpy(&y, &x, 4); return y; }
static float infinity() { return INFINITY; }
static float half_to_float(unsigned short x) { _Float16 y; std::memcpy(&y, &x, 2); return (float)y; }
static unsigned short float_to_half(float x) {
    _Float16 y = (_Float16)x;
    unsigned short z;
    std::memcpy(&z, &y, 2);
    return z;
}
static unsigned short float_to_bf16(float x) {
    unsigned bits = (unsigned)as_int(x);
    return (unsigned short)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

// Every lane's share of a warp-wide exchange of `N` words.
template <int N> static void gather(const unsigned (&mine)[N], unsigned (&all)[32][N]) {
    for (int i = 0; i < N; i++) {
        emulator::Warp &w = emulator::warp();
        int buffer = w.shuffles.generation & 1;
        w.slots[buffer][thread_id() % 32] = mine[i];
        emulator::meet(w.shuffles);
        for (int l = 0; l < 32; l++) all[l][i] = w.slots[buffer][l];
    }
}

static void tiles(unsigned (&x)[4], const void *row, bool transposed) {
    if ((size_t)row % 16) {
        std::fprintf(stderr, "matrix row at an unaligned address\n");
        std::abort();
    }
    unsigned address[2] = {(unsigned)(size_t)row, (unsigned)((size_t)row >> 32)}, rows[32][2];
    gather(address, rows);
    int lane = thread_id() % 32;
    for (int m = 0; m < 4; m++) {
        unsigned short out[2];
        for (int i = 0; i < 2; i++) {
            int r = transposed ? lane % 4 * 2 + i : lane / 4, c = transposed ? lane / 4 : lane % 4 * 2 + i;
            unsigned *from = rows[m * 8 + r];
            out[i] = ((const unsigned short *)((size_t)from[0] | (size_t)from[1] << 32))[c];
        }
        std::memcpy(&x[m], out, 4);
    }
    sync_warp();
}
static void load_tiles(unsigned (&x)[4], const void *row) { tiles(x, row, false); }
static void load_tiles_transposed(unsigned (&x)[4], const void *row) { tiles(x, row, true); }

static float part_of(unsigned two, int i, bool half) {
    unsigned short x = (unsigned short)(two >> 16 * i);
    return half ? half_to_float(x) : as_float((unsigned)x << 16);
}
template <bool HALF>
static void multiply_as(float (&c)[4], unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned b0, unsigned b1) {
    unsigned mine[6] = {a0, a1, a2, a3, b0, b1}, all[32][6];
    gather(mine, all);
    int g = thread_id() % 32 / 4, t = thread_id() % 4;
    for (int j = 0; j < 4; j++) {
        int row = g + j / 2 * 8, column = t * 2 + j % 2;
        float sum = 0.0f;
        for (int k = 0; k < 16; k++) {
            unsigned a = all[row % 8 * 4 + k % 8 / 2][row / 8 + k / 8 * 2];
            unsigned b = all[column * 4 + k % 8 / 2][4 + k / 8];
            sum += part_of(a, k % 2, HALF) * part_of(b, k % 2, HALF);
        }
        c[j] += sum;
    }
}
static void multiply(float (&c)[4], unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned b0, unsigned b1) {
    multiply_as<FP16>(c, a0, a1, a2, a3, b0, b1);
}
static void multiply_half(float (&c)[4], unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned b0, unsigned b1) {
    multiply_as<true>(c, a0, a1, a2, a3, b0, b1);
}
static void multiply_bytes(
    int (&d)[4], unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned b0, unsigned b1, const int (&c)[4]) {
    unsigned mine[6] = {a0, a1, a2, a3, b0, b1}, all[32][6];
    gather(mine, all);
    int g = thread_id() % 32 / 4, t = thread_id() % 4;
    for (int j = 0; j < 4; j++) {
        int row = g + j / 2 * 8, column = t * 2 + j % 2;
        d[j] = c[j];
        for (int k = 0; k < 32; k++) {
            unsigned a = all[row % 8 * 4 + k % 16 / 4][row / 8 + k / 16 * 2];
            unsigned b = all[column * 4 + k % 16 / 4][4 + k / 16];
            d[j] += (int)(a >> k % 4 * 8 & 255) * (signed char)(b >> k % 4 * 8 & 255);
        }
    }
}
static unsigned short e4m3_to_half(unsigned char x) {
    int exponent = x >> 3 & 15, mantissa = x & 7;
    float size = exponent ? std::ldexp(8.0f + mantissa, exponent - 10) : std::ldexp((float)mantissa, -9);
    if ((x & 0x7f) == 0x7f) size = NAN;
    return float_to_half(x & 0x80 ? -size : size);
}
static unsigned e4m3_lower(unsigned x) {
    return e4m3_to_half((unsigned char)x) | (unsigned)e4m3_to_half((unsigned char)(x >> 8)) << 16;
}
static unsigned e4m3_upper(unsigned x) { return e4m3_lower(x >> 16); }
static unsigned spread_lower(unsigned x) { return (x & 0xff) << 8 | (x & 0xff00) << 16; }
static unsigned spread_upper(unsigned x) { return spread_lower(x >> 16); }

static unsigned transposed(unsigned x) {
    unsigned mine[1] = {x}, all[32][1], out = 0;
    gather(mine, all);
    int lane = thread_id() % 32;
    for (int j = 0; j < 2; j++) {  // row `lane % 4 * 2 + j`, column `lane / 4`
        unsigned word = all[(lane % 4 * 2 + j) * 4 + lane / 8][0];
        out |= (word >> lane / 4 % 2 * 16 & 0xffff) << j * 16;
    }
    return out;
}

static void copy_in(void *to, const void *from) {
    if ((size_t)to % 16 || (size_t)from % 16) {
        std::fprintf(stderr, "copy of unaligned bytes\n");
        std::abort();
    }
    std::memset(to, 0xff, 16);
    emulator::current->open.push_back({to, from, 16});
}
static void copy_word(void *to, const void *from) {
    std::memset(to, 0xff, 4);
    emulator::current->open.push_back({to, from, 4});
}
static void load_once(unsigned (&x)[4], const void *from) { std::memcpy(x, from, 16); }
static void close_copies() {
    emulator::current->closed.push_back(std::move(emulator::current->open));
    emulator::current->open.clear();
}
template <int N> static void wait_copies() {
    auto &closed = emulator::current->closed;
    for (; closed.size() > N; closed.erase(closed.begin()))
        for (auto &copy : closed[0]) std::memcpy(copy.to, copy.from, copy.size);
}

static char *shared_memory_base() { return emulator::current->block->base; }
#define shared_memory shared_memory_base()
#define KERNEL(threads, a_multiprocessor) static void
#define KERNEL_PARAMS const Params &p

#include "fused.cu"

namespace emulator {

static const spla::Params *parameters;
static void (*kernel)(const spla::Params &);

static void enter() {
    kernel(*parameters);
    current->done = true;
    progress++;
    yield();
}

static bool run_cluster(int num_blocks, int threads, size_t shared_bytes) {
    blocks.clear();
    cluster = Meeting{num_blocks * threads};
    for (int r = 0; r < num_blocks; r++) {
        auto block = std::make_unique<Block>();
        block->rank = r;
        block->shared.assign(shared_bytes + 128, (char)0xff);
        block->base = (char *)(((size_t)block->shared.data() + 127) / 128 * 128);
        block->all.total = threads;
        block->warps.resize(threads / 32);
        for (auto &w : block->warps) w.meeting.total = w.shuffles.total = 32;
        blocks.push_back(std::move(block));
    }
    constexpr size_t stack = 96 << 10;
    static std::vector<std::unique_ptr<char[]>> stacks;  // kept from launch to launch
    std::vector<Fiber> fibers(num_blocks * threads);
    while (stacks.size() < fibers.size()) stacks.emplace_back(new char[stack]);
    for (int i = 0; i < (int)fibers.size(); i++) {
        Fiber &f = fibers[i];
        f.block = blocks[i / threads].get();
        f.tid = i % threads;
        // As a call of `enter` finds it: registers of nothing, where to go, and where to return to, which it never does.
        void **top = (void **)(((size_t)stacks[i].get() + stack) / 16 * 16) - 1;
        top[0] = nullptr;
        *--top = (void *)enter;
        for (int r = 0; r < 6; r++) *--top = nullptr;
        f.top = top;
    }
    for (size_t left = fibers.size(); left > 0;) {
        long before = progress;
        for (auto &f : fibers) {
            if (f.done) continue;
            current = &f;
            emulator_switch(&scheduler, f.top);
            left -= f.done;
        }
        if (progress == before) return false;
    }
    return true;
}

}  // namespace emulator

// 0, or 1 where threads waited for each other in vain. `score_blocks` share a row in the launch that scores ahead.
extern "C" int emulate(
    const spla::Params *parameters, int num_blocks, int heads, int rows, size_t shared_bytes, int score_blocks) {
    using namespace emulator;
    emulator::parameters = parameters;
#if SCORED
    kernel = spla::spla_score_units;
    num_blocks_x = score_blocks;
    for (row = 0; row < rows; row++)
        for (head = 0; head < (heads + spla::SCORE_WARPS - 1) / spla::SCORE_WARPS; head++)
            for (first_block = 0; first_block < score_blocks; first_block++)
                if (!run_cluster(1, spla::SCORE_WARPS * 32, 0)) return 1;
    first_block = 0;
#endif
    kernel = spla::spla_fused_decode;
    for (row = 0; row < rows; row++)
        for (head = 0; head < heads; head++)
            if (!run_cluster(num_blocks, spla::THREADS, shared_bytes)) return 1;
    return 0;
}
