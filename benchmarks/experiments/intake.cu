// Each block takes in `total` bytes by pieces of `piece` bytes, which begin at `at[...]` times 512 bytes of `base`, and says how
// many clocks that took. Way 0: asynchronous copies of 16 bytes a lane; 1: bulk copies; 2: loads to registers.
typedef unsigned u32;
typedef unsigned long long u64;
extern __shared__ __align__(128) char memory[];

__device__ u32 shared_address(const void *p) { return (u32)__cvta_generic_to_shared(p); }

extern "C" __global__ void __launch_bounds__(256, 1)
intake(const char *base, const u32 *at, long long *clocks, int way, int piece, int total) {
    __shared__ __align__(8) u64 barrier;
    int tid = threadIdx.x, pieces = total / piece, lanes = piece / 16;
    if (tid == 0) asm volatile("mbarrier.init.shared.b64 [%0], 1;" ::"r"(shared_address(&barrier)));
    at += blockIdx.x * (total / 512);
    __syncthreads();
    long long begin = clock64();
    if (way == 0) {
        for (int i = tid; i < total / 16; i += 256)
            asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(memory + i / 32 * 528 + i % 32 * 16)),
                         "l"(base + (u64)at[i / lanes] * 512 + i % lanes * 16) : "memory");
        asm volatile("cp.async.wait_all;" ::: "memory");
    } else if (way == 1) {
        if (tid == 0)
            asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(shared_address(&barrier)), "r"(total) : "memory");
        __syncthreads();
        if (tid < 32)
            for (int i = tid; i < pieces; i += 32)
                asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
                             "r"(shared_address(memory + i * piece)), "l"(base + (u64)at[i] * 512), "r"(piece),
                             "r"(shared_address(&barrier)) : "memory");
        for (u32 done = 0; !done;)
            asm volatile("{.reg .pred p; mbarrier.try_wait.parity.shared.b64 p, [%1], 0; selp.u32 %0, 1, 0, p;}"
                         : "=r"(done) : "r"(shared_address(&barrier)) : "memory");
    } else {
        u32 sum = 0;
#pragma unroll 16
        for (int i = tid; i < total / 16; i += 256) {
            uint4 x = *(const uint4 *)(base + (u64)at[i / lanes] * 512 + i % lanes * 16);
            sum ^= x.x ^ x.y ^ x.z ^ x.w;
        }
        if (sum == 0x12345) clocks[100000] = sum;  // or the loads would be left out
    }
    __syncthreads();
    if (tid == 0) clocks[blockIdx.x] = clock64() - begin;
}
