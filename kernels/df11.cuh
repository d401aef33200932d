// The published DFloat11 layout (docs/format.md): constants and device functions that all kernels share.
#pragma once
#include <cstdint>

namespace df11 {

constexpr int kChunkBytes = 8;        // of the stream, decoded by one thread
constexpr int kBlockChunks = 512;     // chunks with one entry of output_positions
constexpr int kChunkBits = 8 * kChunkBytes;
constexpr int kBlockBytes = kChunkBytes * kBlockChunks;
constexpr int kFirstPointer = 240;    // a table value from here on points to table 256 - value
// Everything one decode needs. All pointers are to device memory.
struct Unit {
  const uint8_t* luts;               // [tables + 1, 256], last row: code length by exponent
  const uint8_t* stream;             // [bytes] encoded_exponent, 16-byte aligned
  const uint8_t* sign_mantissa;      // [weights]
  const uint8_t* gaps;               // [320 * blocks], 5 bits a chunk
  const uint32_t* positions;         // [blocks + 1]
  uint16_t* out;                     // [weights] bf16 patterns
  int64_t bytes;
  int64_t weights;
  int32_t tables;
};

// Weights of a block from two entries of positions; nothing outside of the output, also where these are not sound.
__device__ __forceinline__ int weights_between(const Unit& unit, int64_t begin, int64_t end) {
  return int(min(max(min(end, unit.weights) - begin, int64_t(0)), int64_t(kBlockBytes * 8)));
}

// 64 bits of the stream from byte `at` on, the first byte highest; zeros past its end. `at` is a multiple of 8.
__device__ __forceinline__ uint64_t load_chunk(const uint8_t* stream, int64_t bytes, int64_t at) {
  if (at + 8 <= bytes) {
    const uint2 raw = __ldg(reinterpret_cast<const uint2*>(stream + at));
    return uint64_t(__byte_perm(raw.x, 0, 0x0123)) << 32 | __byte_perm(raw.y, 0, 0x0123);
  }
  uint64_t value = 0;
  for (int i = 0; i < 8; i++) value = value << 8 | (at + i < bytes ? stream[at + i] : 0);
  return value;
}

// The 5 bits at which the first code of a chunk starts. Eight gaps are five bytes, so a gap never leaves its group.
__device__ __forceinline__ int load_gap(const uint8_t* gaps, int64_t chunk) {
  const int64_t bit = chunk * 5;
  const int byte = int(bit & 7);
  const uint8_t* at = gaps + (bit >> 3);
  const uint32_t pair = uint32_t(at[0]) << 8 | (byte > 3 ? at[1] : 0);  // the second byte only where the gap reaches into it
  return (pair >> (11 - byte)) & 31;
}

// Walk the tables with the bits on top of `window`. Returns exponent | length << 8; where the tables are not sound, the exponent is
// kFirstPointer or more, or the length 0 or more than 32. At most four steps, one for each byte of a code.
__device__ __forceinline__ uint32_t walk(const uint8_t* luts, int tables, uint32_t window) {
  uint32_t value = luts[window >> 24];
#pragma unroll
  for (int byte = 2; byte >= 0; byte--)
    if (value >= kFirstPointer) value = luts[min(256 - value, uint32_t(tables)) * 256 + ((window >> (8 * byte)) & 255)];
  return value | luts[tables * 256 + value] << 8;
}

// The next 96 bits of the stream, shifted out at the top.
struct Bits {
  uint32_t a, b, c;
  __device__ __forceinline__ void skip(uint32_t n) {  // by 32 bits at most
    a = __funnelshift_lc(b, a, n);
    b = __funnelshift_lc(c, b, n);
    c = __funnelshift_lc(0, c, n);
  }
  // The code on top: exponent | length << 8. Steps over it, over one bit where it has no length, so that every walk ends.
  __device__ __forceinline__ uint32_t take(const uint8_t* luts, int tables) {
    const uint32_t walked = max(walk(luts, tables, a), 1u << 8);
    skip(walked >> 8);
    return walked;
  }
};

// This chunk's bits from its first code on, and the first word of the next chunk behind them.
__device__ __forceinline__ Bits load_bits(const uint8_t* stream, int64_t bytes, int64_t at) {
  const uint64_t here = load_chunk(stream, bytes, at), next = load_chunk(stream, bytes, at + kChunkBytes);
  return {uint32_t(here >> 32), uint32_t(here), uint32_t(next >> 32)};
}

// Sum of `value` over the threads of the block before this one. All threads call; `warps` is shared memory, one entry a warp.
template <int kWarps>
__device__ __forceinline__ int sum_before(int value, int32_t (&warps)[kWarps]) {
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  int sum = value;
#pragma unroll
  for (int d = 1; d < 32; d *= 2) {
    const int other = __shfl_up_sync(~0u, sum, d);
    if (lane >= d) sum += other;
  }
  if (lane == 31) warps[warp] = sum;
  __syncthreads();
  return __reduce_add_sync(~0u, lane < warp ? warps[lane] : 0) + sum - value;
}

__device__ __forceinline__ uint16_t merge(uint32_t exponent, uint32_t sign_mantissa) {
  return uint16_t((sign_mantissa & 0x80) << 8 | exponent << 7 | (sign_mantissa & 0x7F));
}

// Eight weights.
__device__ __forceinline__ uint4 merge8(uint2 exponents, uint2 sign_mantissa) {
  uint32_t w[4];
#pragma unroll
  for (int k = 0; k < 4; k++) {
    const uint32_t e = k < 2 ? exponents.x : exponents.y, m = k < 2 ? sign_mantissa.x : sign_mantissa.y;
    const uint32_t moved = __byte_perm(e, 0, k & 1 ? 0x4342 : 0x4140) * 128;
    const uint32_t both = __byte_perm(m, 0, k & 1 ? 0x3322 : 0x1100);  // sign and mantissa in both bytes
    w[k] = both ^ ((both ^ moved) & 0x7F807F80);
  }
  return make_uint4(w[0], w[1], w[2], w[3]);
}

// From exponents in shared memory to weights, coalesced: places shift to shift + count - 1 of `stage`, of which place 0 belongs to
// out[0] and sign_mantissa[0]; those two are aligned to 16 and 8 bytes, shift is below 8. What thread + k * threads loads of 8
// bytes brought for k < kAhead is in `ahead`.
template <int kThreads, int kAhead>
__device__ __forceinline__ void merge_stage(const uint8_t* stage, int shift, int count, const uint8_t* sign_mantissa, uint16_t* out,
                                            const uint2* ahead) {
  const int thread = threadIdx.x, stop = shift + count;
  const auto store = [&](int i, uint2 m) {
    __stcs(reinterpret_cast<uint4*>(out + i), merge8(*reinterpret_cast<const uint2*>(stage + i), m));
  };
  if (stop >= kAhead * kThreads * 8) {
#pragma unroll
    for (int k = 0; k < kAhead; k++)
      if (k > 0 || thread > 0 || shift == 0) store((thread + k * kThreads) * 8, ahead[k]);
  } else {
#pragma unroll
    for (int k = 0; k < kAhead; k++) {
      const int i = (thread + k * kThreads) * 8;
      if (i >= shift && i + 8 <= stop) store(i, ahead[k]);
    }
  }
  for (int i = (thread + kAhead * kThreads) * 8; i + 8 <= stop; i += kThreads * 8)
    if (kAhead || i >= shift) store(i, __ldcs(reinterpret_cast<const uint2*>(sign_mantissa + i)));
  // The ends, where the output is not aligned: threads 0-7 before the first eight, threads 8-15 behind the last.
  const int rest = stop & ~7;
  const int i = thread < 8 ? thread : rest + thread - 8;
  if (thread < 16 && i >= shift && i < stop && (thread < 8 ? shift > 0 : rest > 0 || shift == 0))
    out[i] = merge(stage[i], sign_mantissa[i]);
}

}  // namespace df11
