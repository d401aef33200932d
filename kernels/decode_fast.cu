// DFloat11 decompression, same bytes as decode_paper.cu, faster.
//
//   nvcc -O3 -std=c++17 -arch=sm_90 -cubin -o decode_fast.cubin decode_fast.cu        (sm_80: the same with -arch=sm_80)
//
// Against Algorithm 1 (decode_paper.cu): a thread takes two chunks, so that what is done once a thread counts half; an 11-bit
// window gives up to four exponents a lookup; every code is decoded once, into words of shared memory of the thread's own; when
// the scan has told its place, a thread copies whole words, shifted, and gets the bytes of a word that it shares with its
// neighbour from that neighbour by shuffle; what the next block of the stream needs is under way meanwhile; the last pass merges
// and stores 16 bytes at aligned places of the output. Thread blocks are persistent: the 16 KB table is loaded once.
//
// Ceiling on an H200 (4.23 TB/s copied): a weight moves 1.35 bytes in (10.8 bits) and 2 out, so 2.53 TB/s of bf16 output.
// docs/kernel-log.md has what each version gained.
#include "df11.cuh"

using namespace df11;

constexpr int kFastThreads = kBlockChunks / 2;
constexpr int kThreadBytes = 2 * kChunkBytes;
constexpr int kThreadBits = 8 * kThreadBytes;
constexpr int kBlocksPerSM = 4;
constexpr int kWindow = 11;       // bits of the table's index
constexpr int kWords = 19;        // words of a thread's own
constexpr int kMost = 4 * kWords - 8;  // exponents from which on it looks up no more; chunks of more short codes are walked
constexpr int kStage = 16384;     // exponents staged; a block of very short codes is walked
constexpr int kAhead = 6;         // loads of 8 sign_mantissa bytes that a thread has under way while it decodes

// One entry, by the next 11 bits: x is up to four exponents whose codes lie wholly in the window, first code lowest. y is their
// bits + 8 * how many << 16; 0 where the first code is longer than the window.
struct FastShared {
  uint2 table[1 << kWindow];
  uint32_t words[kWords][kFastThreads];
  alignas(16) uint8_t stage[kStage + 8];
  int32_t warps[kFastThreads / 32];
  uint8_t luts[18 * 256];
};

// What a thread reads of a block of the stream, as it lies in memory.
struct Fetched {
  uint32_t words[5];  // its own four, and the one behind them
  uint32_t begin, end;
  uint8_t gap[2], next_gap[2];
};

// Whether the stream goes on for more than a chunk behind this block, so that no thread is near its end.
__device__ __forceinline__ bool is_inside(const Unit& unit, int64_t block) {
  return (block + 1) * kBlockBytes + kChunkBytes < unit.bytes;
}

__device__ __forceinline__ Fetched fetch(const Unit& unit, int64_t block, int thread) {
  Fetched f;
  const int64_t at = block * kBlockBytes + thread * kThreadBytes;
  const bool inside = is_inside(unit, block);
  if (inside) {
    const uint4 own = __ldcs(reinterpret_cast<const uint4*>(unit.stream + at));
    f.words[0] = own.x, f.words[1] = own.y, f.words[2] = own.z, f.words[3] = own.w;
    f.words[4] = __ldg(reinterpret_cast<const uint32_t*>(unit.stream + at) + 4);
  } else {
#pragma unroll
    for (int k = 0; k < 5; k++) f.words[k] = 0;
#pragma unroll
    for (int i = 0; i < kThreadBytes + 4; i++)
      if (at + i < unit.bytes) f.words[i / 4] |= uint32_t(unit.stream[at + i]) << 8 * (i & 3);
  }
  // A gap's second byte is read where it is needed, so never past the end.
  const uint8_t* const gaps = unit.gaps + block * (kBlockChunks * 5 / 8);
  const int bit = thread * 10, next = bit + 10;
  f.gap[0] = __ldg(gaps + bit / 8);
  f.gap[1] = __ldg(gaps + bit / 8 + (bit % 8 > 3));
  const bool last = !inside && at + kThreadBytes >= unit.bytes;
  f.next_gap[0] = last ? 0 : __ldg(gaps + next / 8);
  f.next_gap[1] = last ? 0 : __ldg(gaps + next / 8 + (next % 8 > 3));
  f.begin = __ldg(unit.positions + block);
  f.end = __ldg(unit.positions + block + 1);
  return f;
}

__device__ __forceinline__ int gap_of(const uint8_t (&bytes)[2], int bit) { return (bytes[0] << 8 | bytes[1]) >> (11 - bit % 8) & 31; }

// One code, of any length, as an entry.
__device__ __noinline__ uint2 long_code(const uint8_t* luts, int tables, uint32_t window) {
  const uint32_t walked = walk(luts, tables, window);
  return make_uint2(walked & 255, min(max(walked >> 8, 1), 32) | 8 << 16);
}

// A thread's codes one by one: its next code's exponent, until `bit` passes its end.
struct Walker {
  const Unit& unit;
  int64_t at;
  int bit;
  __device__ __forceinline__ bool more() const { return bit < kThreadBits && at < unit.bytes; }
  __device__ __forceinline__ uint8_t next() {
    Bits bits = load_bits(unit.stream, unit.bytes, at + (bit & kChunkBits) / 8);
    bits.skip(bit & 32);
    bits.skip(bit & 31);
    const uint32_t walked = bits.take(unit.luts, unit.tables);
    bit += walked >> 8;
    return uint8_t(walked);
  }
};

extern "C" __constant__ const int decode_fast_launch[] = {kFastThreads, int(sizeof(FastShared)), kBlocksPerSM};

// A unit of a launch: its table from build_table, and the thread blocks that share it, at most as many as its stream has blocks.
struct Part {
  Unit unit;
  const uint2* table;
  int32_t first, count;
};

// Units decoded by one launch, in a kernel's 4 KB of arguments. Behind the last one, `first` is beyond the grid.
constexpr int kMostParts = 40;
struct Batch {
  Part parts[kMostParts];
};
static_assert(sizeof(Part) == 88 && sizeof(Batch) <= 4096, "df11/gpu.py packs them");

extern "C" __global__ void __launch_bounds__(kFastThreads, kBlocksPerSM) decode_fast(const __grid_constant__ Batch batch) {
  extern __shared__ __align__(16) unsigned char raw[];
  FastShared& s = *reinterpret_cast<FastShared*>(raw);
  const int thread = threadIdx.x, lane = thread & 31;
  int part = 0;
  while (part + 1 < kMostParts && batch.parts[part + 1].first <= int(blockIdx.x)) part++;
  const Unit& unit = batch.parts[part].unit;
  const uint2* const __restrict__ table = batch.parts[part].table;
  const int rank = int(blockIdx.x) - batch.parts[part].first, ranks = batch.parts[part].count;
  const int64_t blocks = (unit.bytes + kBlockBytes - 1) / kBlockBytes;
  // The last block comes first: its end takes longer than anything else.
  const auto turn = [&](int64_t k) { return k < ranks ? blocks - ranks + k : k - ranks; };
  Fetched f = fetch(unit, turn(rank), thread);
  for (int i = thread; i < (1 << kWindow) / 2; i += kFastThreads)
    reinterpret_cast<uint4*>(s.table)[i] = __ldg(reinterpret_cast<const uint4*>(table) + i);
  for (int i = thread; i < (unit.tables + 1) * 256; i += kFastThreads) s.luts[i] = unit.luts[i];
  // A short code, repeated: after the end of a thread's codes it stands in for what follows.
  const uint2 filler = __ldg(table + (1 << kWindow));
  __syncthreads();

  for (int64_t own = rank; own < blocks; own += ranks) {
    const int64_t block = turn(own);
    const int64_t begin = f.begin;
    const int count = weights_between(unit, begin, f.end);
    // Stage and output are aligned alike: place 0 of the stage is weight begin - shift.
    const int shift = int(begin & 7);
    const int64_t at = block * kBlockBytes + thread * kThreadBytes;
    const int gap = gap_of(f.gap, thread * 10), next_gap = gap_of(f.next_gap, thread * 10 + 10);

    uint2 ahead[kAhead];
    const uint8_t* const from = unit.sign_mantissa + begin - shift;
    const bool plenty = shift + count >= kAhead * kFastThreads * 8;  // for all loads ahead
#pragma unroll
    for (int k = 0; k < kAhead; k++) {
      const int i = (thread + k * kFastThreads) * 8;
      if (plenty || i + 8 <= shift + count) ahead[k] = __ldcs(reinterpret_cast<const uint2*>(from + i));
    }

    int codes = 0;
    bool walked = false;
    const bool inside = is_inside(unit, block);
    if (inside || at < unit.bytes) {
      // Where the stream ends, no next gap says where this thread's last code does: there it goes code by code, to the last byte.
      const int64_t left = unit.bytes - at;
      const bool tail = !inside && left <= kThreadBytes + kChunkBytes;
      uint32_t w[5];
#pragma unroll
      for (int k = 0; k < 5; k++) w[k] = __byte_perm(f.words[k], 0, 0x0123);
      if (!tail) w[4] = (w[4] & ~(~0u >> next_gap)) | filler.x >> next_gap;
      const auto skip = [&](uint32_t n) {  // the lowest five bits of n count
#pragma unroll
        for (int k = 0; k < 4; k++) w[k] = __funnelshift_l(w[k + 1], w[k], n);
        w[4] = __funnelshift_l(0, w[4], n);
      };
      skip(gap);
      // word: the latest exponents, not yet four. sum: bits seen, up to the sign bit of its lower byte, and 8 * exponents << 16, of
      // which the lowest five bits are their place in `word`, up to the sign bit of the whole.
      constexpr uint32_t kNone = (0x8000 - 8 * kMost) << 16, kDone = 0x80000000 | kThreadBits;
      static_assert(kThreadBits == 128 && kMost % 4 == 0, "");
      uint32_t word = 0, sum = kNone | gap;
      uint32_t* to = &s.words[0][thread];
      const auto look = [&](bool table) {
        uint2 entry = table ? s.table[w[0] >> (32 - kWindow)] : make_uint2(0, 0);
        if (entry.y == 0) {
          entry = long_code(s.luts, unit.tables, w[0]);
          skip(1);  // a code of 32 bits in two steps
          entry.y--;
          sum++;
        }
        skip(entry.y);
        const uint32_t before = sum, fill = sum >> 16;
        sum += entry.y;
        word |= entry.x << (fill & 31);
        if ((sum ^ before) >= 1 << 21) {
          *to = word;
          to += kFastThreads;
          word = __funnelshift_l(entry.x, 0, fill);
        }
      };
      const int early = tail ? kThreadBits - min(int(left), kThreadBytes) * 8 : 0;
      sum += tail ? early + kWindow : 0;
      while (!(sum & kDone)) look(true);
      if (tail) {
        sum -= kWindow;
        while (!(sum & kDone)) look(false);
      }
      *to = word;
      walked = !(sum & kThreadBits);
      codes = (sum - kNone) >> 19;
      // Behind the last code, fillers were read. (The minimum holds with unsound tables too.)
      if (!tail) codes = min(codes - (((sum & 0xFFFF) - kThreadBits - next_gap) * filler.y >> 8), uint32_t(codes));
    }
    if (walked) {
      Walker walker = {unit, at, gap};
      for (codes = 0; walker.more(); codes++) walker.next();
    }
    const int place = sum_before(codes, s.warps);

    if (count > kStage) {
      Walker walker = {unit, at, gap};
      for (int i = place; i < place + codes && i < count; i++)
        unit.out[begin + i] = merge(walker.next(), unit.sign_mantissa[begin + i]);
    } else if (__any_sync(~0u, walked || codes < 4 || place + codes > count)) {
      // Byte by byte.
      Walker walker = {unit, at, gap};
      for (int i = 0; i < codes && place + i < count; i++)
        s.stage[shift + place + i] = walked ? walker.next() : uint8_t(s.words[i / 4][thread] >> 8 * (i & 3));
    } else {
      const int first = shift + place, open = first & 3, stop = open + codes, full = stop >> 2;
      uint8_t* const bytes = s.stage + (first & ~3);
      uint32_t* const to = reinterpret_cast<uint32_t*>(bytes);
      // The bytes behind the last full word are for the next lane. Between warps, each writes its own bytes.
      const uint32_t last = __funnelshift_l(s.words[full - 1][thread], s.words[full][thread], 8 * open) & ~(~0u << 8 * (stop & 3));
      const uint32_t head = __shfl_up_sync(~0u, last, 1);
      uint32_t word = s.words[0][thread];
      const uint32_t merged = word << 8 * open | (lane ? head : 0);
      if (lane || !open) *to = merged;
#pragma unroll
      for (int i = 1; i < 4; i++)
        if (!lane && open && i >= open) bytes[i] = uint8_t(merged >> 8 * i);
#pragma unroll
      for (int i = 0; i < 3; i++)
        if (lane == 31 && i < (stop & 3)) bytes[4 * full + i] = uint8_t(last >> 8 * i);
      for (int k = 1; k < full; k++) {
        const uint32_t above = s.words[k][thread];
        to[k] = __funnelshift_l(word, above, 8 * open);
        word = above;
      }
    }
    if (own + ranks < blocks) f = fetch(unit, turn(own + ranks), thread);
    __syncthreads();
    if (count > kStage) continue;

    merge_stage<kFastThreads, kAhead>(s.stage, shift, count, from, unit.out + begin - shift, ahead);
  }
}

// The table of decode_fast from a unit's luts, uint2 [2048 + 1], one thread a window. Once for each unit, at load time. Behind the
// table: the shortest code, repeated to 32 bits, and 256 / its length, rounded up.
extern "C" __global__ void build_table(const uint8_t* luts, int tables, uint2* table) {
  const uint32_t window = blockIdx.x * blockDim.x + threadIdx.x;
  if (window >= (1 << kWindow)) return;
  uint32_t bits = window << (32 - kWindow), exponents = 0;
  int used = 0, n = 0;
  for (; n < 4; n++) {
    const uint32_t walked = walk(luts, tables, bits);
    const int length = walked >> 8;
    if (length == 0 || used + length > kWindow) break;  // also where the tables are not sound
    exponents |= (walked & 255) << (8 * n);
    used += length;
    bits <<= length;
  }
  table[window] = make_uint2(exponents, used | 8 * n << 16);
  if (window == 0) {
    uint32_t code = 0, length = 33;
    for (uint32_t first = 0; first < 256; first++) {  // by the first byte: the shortest code of a real table has at most 8 bits
      const uint32_t walked = walk(luts, tables, first << 24);
      if (walked >> 8 && walked >> 8 <= 8 && walked >> 8 < length) {
        length = walked >> 8;
        code = first << 24 >> (32 - length);
      }
    }
    if (length > 8) length = 8;  // not sound
    uint32_t filler = 0;
    for (uint32_t at = 0; at < 32; at += length) filler |= at + length <= 32 ? code << (32 - at - length) : code >> (at + length - 32);
    table[1 << kWindow] = make_uint2(filler, (256 + length - 1) / length);
  }
}
