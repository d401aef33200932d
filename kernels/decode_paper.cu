// DFloat11 decompression as the paper describes it (arXiv 2504.11651, Algorithm 1).
//
//   nvcc -O3 -std=c++17 -arch=sm_90 -cubin -o decode_paper.cubin decode_paper.cu      (sm_80: the same with -arch=sm_80)
//
// Hierarchical tables in shared memory; 8 bytes of the stream a thread; a gap of 5 bits says where its first code starts. Phase 1
// counts the codes of each thread, a scan over the block turns counts into places, phase 2 decodes again into a shared write
// buffer, which is then written in order. The baseline of decode_fast.cu, not the kernel to use.
//
// Ceiling: two dependent table reads a code in each phase (symbol, length), each with random banks, bound it long before memory
// does; the released kernel reaches 0.45 to 0.54 TB/s of bf16 output on an H200.
#include "df11.cuh"

using namespace df11;

constexpr int kBuffer = 16384;  // exponents in shared memory at a time; a block of very short codes takes several rounds

struct PaperShared {
  uint8_t luts[18 * 256];
  alignas(8) uint8_t buffer[kBuffer + 8];
  int32_t warps[kBlockChunks / 32];
};

extern "C" __constant__ const int decode_paper_launch[] = {kBlockChunks, int(sizeof(PaperShared)), 0};

// Of a multiprocessor: 2048 threads are 4, the 1536 of consumer GPUs 3.
#if __CUDA_ARCH__ == 860 || __CUDA_ARCH__ == 890 || __CUDA_ARCH__ >= 1200
#define PAPER_BLOCKS 3
#else
#define PAPER_BLOCKS 4
#endif
extern "C" __global__ void __launch_bounds__(kBlockChunks, PAPER_BLOCKS) decode_paper(Unit unit) {
  extern __shared__ __align__(16) unsigned char raw[];
  PaperShared& s = *reinterpret_cast<PaperShared*>(raw);
  const int thread = threadIdx.x;
  for (int i = thread; i < (unit.tables + 1) * 256; i += kBlockChunks) s.luts[i] = unit.luts[i];

  const int64_t block = blockIdx.x;
  const int64_t chunk = block * kBlockChunks + thread;
  const bool in_stream = chunk * kChunkBytes < unit.bytes;
  const int gap = load_gap(unit.gaps, chunk);
  Bits start = load_bits(unit.stream, unit.bytes, chunk * kChunkBytes);
  start.skip(gap);
  const int64_t begin = unit.positions[block];
  const int count = weights_between(unit, begin, unit.positions[block + 1]);
  __syncthreads();

  // Phase 1: count.
  int codes = 0;
  Bits bits = start;
  if (in_stream)
    for (int bit = gap; bit < kChunkBits; codes++) bit += bits.take(s.luts, unit.tables) >> 8;
  const int at = sum_before(codes, s.warps);

  // The buffer and the output are aligned alike.
  const int shift = int(begin & 7);
  for (int round = 0; round < count; round += kBuffer) {
    // Phase 2: decode again into the write buffer.
    const int end = min(count - round, kBuffer);
    bits = start;
    for (int place = at - round, stop = min(place + codes, end); place < stop; place++) {
      const uint32_t exponent = bits.take(s.luts, unit.tables);
      if (place >= 0) s.buffer[shift + place] = uint8_t(exponent);
    }
    __syncthreads();
    const int64_t to = begin + round - shift;
    merge_stage<kBlockChunks, 0>(s.buffer, shift, end, unit.sign_mantissa + to, unit.out + to, nullptr);
    __syncthreads();
  }
}
