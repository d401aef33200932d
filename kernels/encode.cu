// DFloat11 compression on the GPU, to the same bytes as the CPU encoder.
//
//   nvcc -O3 -std=c++17 -arch=sm_90 -cubin -o encode.cubin encode.cu                  (sm_80: the same with -arch=sm_80)
//
// The stream is cut into tiles of 4096 weights. In order:
//   histogram_split   counts exponents, writes sign and mantissa          (then the host makes the code: 256 counts)
//   tile_bits         code bits of each tile
//   scan              exclusive sum of them: where each tile starts
//   encode_tiles      codes of a tile packed in shared memory, then copied out; gaps and positions by the code that crosses
//   finish            the last byte's padding, the last gap
//   pack_gaps         one byte a chunk to 5 bits
//
// Sums are of integers and shared words are merged by OR, so the result does not depend on the order of anything.
// Ceiling on an H200: 2 bytes of a weight are read three times, 1.35 written: 7.4 bytes at 4.23 TB/s, 1.1 TB/s of bf16.
#include "df11.cuh"

using namespace df11;

constexpr int kThreads = 256;
constexpr int kPerThread = 16;
constexpr int kTile = kThreads * kPerThread;

__device__ __forceinline__ int exponent_of(uint16_t w) { return (w >> 7) & 255; }

// counts: uint64 [256], zeroed. sign_mantissa: [n].
extern "C" __global__ void __launch_bounds__(kThreads)
histogram_split(const uint16_t* weights, int64_t n, unsigned long long* counts, uint8_t* sign_mantissa) {
  __shared__ uint32_t local[kThreads / 32][256];
  const int warp = threadIdx.x >> 5;
  for (int i = threadIdx.x; i < kThreads / 32 * 256; i += kThreads) (&local[0][0])[i] = 0;
  __syncthreads();
  const int64_t stride = int64_t(gridDim.x) * kThreads;
  const int64_t vectors = (reinterpret_cast<uintptr_t>(weights) | reinterpret_cast<uintptr_t>(sign_mantissa)) % 16 ? 0 : n / 8;
  for (int64_t v = int64_t(blockIdx.x) * kThreads + threadIdx.x; v < vectors; v += stride) {
    const uint4 raw = reinterpret_cast<const uint4*>(weights)[v];
    const uint32_t pairs[4] = {raw.x, raw.y, raw.z, raw.w};
    uint32_t out[2] = {0, 0};
#pragma unroll
    for (int k = 0; k < 4; k++)
#pragma unroll
      for (int half = 0; half < 2; half++) {
        const uint16_t w = uint16_t(pairs[k] >> (16 * half));
        atomicAdd(&local[warp][exponent_of(w)], 1);
        out[k / 2] |= uint32_t((w >> 8 & 0x80) | (w & 0x7F)) << (16 * (k & 1) + 8 * half);
      }
    reinterpret_cast<uint2*>(sign_mantissa)[v] = make_uint2(out[0], out[1]);
  }
  for (int64_t i = vectors * 8 + int64_t(blockIdx.x) * kThreads + threadIdx.x; i < n; i += stride) {
    const uint16_t w = weights[i];
    atomicAdd(&local[warp][exponent_of(w)], 1);
    sign_mantissa[i] = uint8_t((w >> 8 & 0x80) | (w & 0x7F));
  }
  __syncthreads();
  unsigned long long total = 0;
  for (int k = 0; k < kThreads / 32; k++) total += local[k][threadIdx.x];
  if (total) atomicAdd(counts + threadIdx.x, total);
}

// Bits of this thread's weights, and the exclusive sum over the block.
struct Place { int64_t first; int64_t end; int bits; int before; int total; };

__device__ __forceinline__ Place place_in_tile(const uint16_t* weights, int64_t n, const uint8_t* lengths,
                                               int32_t (&warp_sums)[kThreads / 32]) {
  Place p;
  p.first = int64_t(blockIdx.x) * kTile + threadIdx.x * kPerThread;
  p.end = min(p.first + kPerThread, n);
  p.bits = 0;
  for (int64_t i = p.first; i < p.end; i++) p.bits += lengths[exponent_of(weights[i])];
  p.before = sum_before(p.bits, warp_sums);
  p.total = 0;
#pragma unroll
  for (int k = 0; k < kThreads / 32; k++) p.total += warp_sums[k];
  return p;
}

// lengths: uint8 [256]; tiles: int64 [tiles].
extern "C" __global__ void __launch_bounds__(kThreads)
tile_bits(const uint16_t* weights, int64_t n, const uint8_t* lengths, int64_t* tiles) {
  __shared__ uint8_t length[256];
  __shared__ int32_t warp_sums[kThreads / 32];
  length[threadIdx.x] = lengths[threadIdx.x];
  __syncthreads();
  const Place p = place_in_tile(weights, n, length, warp_sums);
  if (threadIdx.x == 0) tiles[blockIdx.x] = p.total;
}

// tiles, in place: bits of each -> bit at which each starts. One block; 128 Ki tiles of a 1 GB tensor are 128 rounds.
extern "C" __global__ void __launch_bounds__(1024) scan(int64_t* tiles, int64_t count) {
  __shared__ int64_t warp_sums[32];
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  int64_t carry = 0;
  for (int64_t base = 0; base < count; base += 1024) {
    const int64_t i = base + threadIdx.x;
    const int64_t own = i < count ? tiles[i] : 0;
    int64_t sum = own;
    for (int d = 1; d < 32; d *= 2) {
      const int64_t other = __shfl_up_sync(~0u, sum, d);
      if (lane >= d) sum += other;
    }
    if (lane == 31) warp_sums[warp] = sum;
    __syncthreads();
    int64_t earlier = 0, total = 0;
    for (int k = 0; k < 32; k++) {
      if (k < warp) earlier += warp_sums[k];
      total += warp_sums[k];
    }
    if (i < count) tiles[i] = carry + earlier + sum - own;
    carry += total;
    __syncthreads();
  }
}

// stream: uint32 words, zeroed, most significant bit first; gaps: a byte a chunk, zeroed; positions: uint32, zeroed.
// codes: uint32 [256] in the low bits.
extern "C" __global__ void __launch_bounds__(kThreads)
encode_tiles(const uint16_t* weights, int64_t n, const uint8_t* lengths, const uint32_t* codes, const int64_t* tiles,
             uint32_t* stream, uint8_t* gaps, uint32_t* positions) {
  __shared__ uint8_t length[256];
  __shared__ uint32_t code[256];
  __shared__ int32_t warp_sums[kThreads / 32];
  __shared__ uint32_t words[kTile + 2];  // codes of 32 bits at worst
  length[threadIdx.x] = lengths[threadIdx.x];
  code[threadIdx.x] = codes[threadIdx.x];
  __syncthreads();
  const Place p = place_in_tile(weights, n, length, warp_sums);
  const int64_t start = tiles[blockIdx.x];
  const int64_t first_word = start >> 5;
  const int used = int(((start + p.total + 31) >> 5) - first_word);
  for (int i = threadIdx.x; i < used; i += kThreads) words[i] = 0;
  __syncthreads();

  int64_t bit = start + p.before;
  for (int64_t i = p.first; i < p.end; i++) {
    const int e = exponent_of(weights[i]);
    const int64_t next = bit + length[e];
    const int word = int((bit >> 5) - first_word);
    // The code on top of 64 bits, moved to its place in two words.
    const uint64_t moved = uint64_t(code[e]) << (64 - length[e]) >> (bit & 31);
    atomicOr(words + word, uint32_t(moved >> 32));
    if (uint32_t(moved)) atomicOr(words + word + 1, uint32_t(moved));
    if ((next ^ bit) >> 6) gaps[next >> 6] = uint8_t(next & 63);
    if ((next ^ bit) >> 15) positions[next >> 15] = uint32_t(i + 1);
    bit = next;
  }
  __syncthreads();
  for (int i = threadIdx.x; i < used; i += kThreads) {
    const uint32_t value = __byte_perm(words[i], 0, 0x0123);
    // The words at both ends belong to the neighbouring tiles too.
    if (i == 0 || i == used - 1)
      atomicOr(stream + first_word + i, value);
    else
      stream[first_word + i] = value;
  }
}

// The rules for the end of a stream (docs/format.md). bits > 0; padding: length 0 where there is none.
extern "C" __global__ void finish(uint8_t* stream, uint8_t* gaps, uint32_t* positions, int64_t n, int64_t bits, int padding_length,
                                  uint32_t padding) {
  const int open = int(-bits & 7);
  if (open && padding_length) {
    const uint32_t fill = padding_length >= open ? padding >> (padding_length - open) : padding << (open - padding_length);
    stream[bits >> 3] |= uint8_t(fill);
  }
  if (!open && gaps[bits >> 6] == (bits & 63)) gaps[bits >> 6] = 0;
  positions[(bits + 8 * kBlockBytes - 1) / (8 * kBlockBytes)] = uint32_t(n);
}

// 8 gaps of a byte to 5 bytes a thread.
extern "C" __global__ void pack_gaps(const uint8_t* gaps, int64_t groups, uint8_t* packed) {
  const int64_t group = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (group >= groups) return;
  uint64_t value = 0;
  for (int i = 0; i < 8; i++) value = value << 5 | gaps[group * 8 + i];
  for (int i = 0; i < 5; i++) packed[group * 5 + i] = uint8_t(value >> (8 * (4 - i)));
}
