// The tiled layout on the GPU: its arrays, a warp's way from the codes of a tile to operands of mma.sync, and products by way of
// single ones where x is not finite.
#pragma once

#include <cuda_bf16.h>

#include <cstdint>

namespace tiled {

constexpr int kLanes = 32;
constexpr int kTileRows = 16;
constexpr int kMostWarps = 28;
constexpr int kMostFragments = 36;
constexpr int kTable = 1 << 12;

struct Matrix {
  const uint8_t* low;       // [tiles, F / 2, 32, 16]
  const uint32_t* sign;     // [tiles, F / 4, 32]
  const uint8_t* stream;    // [bytes, 32]
  const uint2* tiles;       // [tiles + 1]: first byte of each lane's stream, first patch
  const uint32_t* patches;  // row << 28 | column << 16 | pattern
  const uint32_t* table;    // [4096]
  uint2 uppers;             // byte of each rank
  int32_t rows, columns, fragments;

  __device__ __forceinline__ int width() const { return 16 * fragments; }  // columns of a tile
  __device__ __forceinline__ int across() const { return (columns + width() - 1) / width(); }  // tiles
  __device__ __forceinline__ int down() const { return (rows + kTileRows - 1) / kTileRows; }
};

// Shared memory: this, from an address that is a multiple of 16 KB on; then for each warp the codes of a tile (of two in
// tiled_wgmma.cu up to 64 rows), in rows of a word a lane; then x.
struct Shared {
  uint32_t table[kTable];  // first: the row before the codes is read too, and not used
  float sums[kMostWarps][2][kTileRows];  // of the first and of the last row of tiles that a warp has a part of
};

// Rows of codes: 2 F of 12 bits, and a row that is read and not used.
__host__ __device__ constexpr int code_rows(int fragments) { return (2 * 12 * fragments + 31) / 32 + 1; }

__device__ __forceinline__ uint32_t address(const void* p) { return uint32_t(__cvta_generic_to_shared(p)); }
__device__ __forceinline__ void copy16(uint32_t to, const void* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
}
__device__ __forceinline__ void copy8(void* to, const void* from, int bytes) {  // the rest of the 8 becomes zero
  asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;" ::"r"(address(to)), "l"(from), "r"(bytes) : "memory");
}
template <int kOffset = 0>
__device__ __forceinline__ uint32_t load_shared(uint32_t at) {
  uint32_t word;
  asm volatile("ld.shared.u32 %0, [%1 + %2];" : "=r"(word) : "r"(at), "n"(kOffset));
  return word;
}
__device__ __forceinline__ void commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
__device__ __forceinline__ void wait() { asm volatile("cp.async.wait_all;" ::: "memory"); }
__device__ __forceinline__ void mma(float (&c)[4], const uint32_t (&a)[4], uint2 b) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b.x), "r"(b.y));
}
__device__ __forceinline__ uint32_t permute(uint32_t x, uint32_t y, uint32_t selector) {  // __byte_perm without masking the selector
  uint32_t out;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(out) : "r"(x), "r"(y), "r"(selector));
  return out;
}
__device__ __forceinline__ float value(uint32_t pattern) { return __uint_as_float(pattern << 16); }

// Low bytes and signs of four fragments, each reloaded when it is used up; kDeep: from four more, loaded ahead. They lie without gaps
// over all tiles, so a run of tiles is read straight on.
template <bool kDeep>
struct Reader {
  const uint4* from;
  const uint32_t* sign_from;
  int left;  // fours, this one too
  uint4 low[2], low_ahead[2];
  uint32_t sign, sign_ahead;

  __device__ __forceinline__ Reader(const Matrix& m, int first, int last, int lane)
      : from(reinterpret_cast<const uint4*>(m.low) + int64_t(first) * m.fragments * 16 + lane),
        sign_from(m.sign + int64_t(first) * m.fragments * 8 + lane),
        left((last - first) * (m.fragments / 4)),
        low(),
        low_ahead(),
        sign(),
        sign_ahead() {
    if (left > 0) low[0] = __ldcs(from), low[1] = __ldcs(from + kLanes), sign = __ldcs(sign_from);
    if (kDeep && left > 1)
      low_ahead[0] = __ldcs(from + 2 * kLanes), low_ahead[1] = __ldcs(from + 3 * kLanes), sign_ahead = __ldcs(sign_from + kLanes);
  }
  __device__ __forceinline__ void next_low(int i) {
    uint4& to = kDeep ? low_ahead[i] : low[i];
    if (kDeep) low[i] = low_ahead[i];
    if (left > 1 + kDeep) to = __ldcs(from + ((1 + kDeep) * 2 + i) * kLanes);
  }
  __device__ __forceinline__ void next_sign() {
    uint32_t& to = kDeep ? sign_ahead : sign;
    if (kDeep) sign = sign_ahead;
    if (left > 1 + kDeep) to = __ldcs(sign_from + (1 + kDeep) * kLanes);
    from += 2 * kLanes, sign_from += kLanes, left--;
  }
};

// A tile's codes on their way to shared memory. bytes: of each lane.
__device__ __forceinline__ void fetch(const Matrix& m, uint32_t first, uint32_t bytes, uint32_t (*codes)[kLanes], int lane) {
  const uint8_t* const from = m.stream + int64_t(first) * kLanes + 16 * lane;
  const uint32_t to = address(codes) + 16 * lane;
#pragma unroll
  for (int i = 0; i < 2 * (code_rows(kMostFragments) - 1) * 4; i += kLanes)
    if (i + lane < 2 * int(bytes)) copy16(to + 16 * i, from + 16 * i);
  commit();
}

// When they have arrived: what is left after whole words lies lane by lane and becomes a row of words.
__device__ __forceinline__ void spread_rest(uint32_t bytes, uint32_t (*codes)[kLanes], int lane) {
  if (const uint32_t rest = bytes & 3) {
    uint32_t* const row = codes[bytes / 4];
    const uint32_t* const from = row + rest * lane / 4;
    const uint32_t word = __funnelshift_r(from[0], from[1], rest * lane * 8);
    __syncwarp();
    row[lane] = word;
  }
  asm volatile("" ::: "memory");  // loads by load_shared stay behind it
}
__device__ __forceinline__ void spread(uint32_t bytes, uint32_t (*codes)[kLanes], int lane) {
  wait();
  __syncwarp();
  spread_rest(bytes, codes, lane);
}

// Two entries of the table, for the codes of a fragment's upper and lower rows. lane_at: 4 lane. entries: address of the table.
__device__ __forceinline__ void look_up(uint32_t& position, uint32_t lane_at, uint32_t entries, uint32_t& first, uint32_t& second) {
  const uint32_t at = (position & ~127u) | lane_at;
  uint32_t window = __funnelshift_r(load_shared(at), load_shared<4 * kLanes>(at), position >> 2);
  first = load_shared((window & 0x3FFC) | entries);
  window >>= first >> 18;
  second = load_shared((window & 0x3FFC) | entries);
  position += (first + second) >> 16;
}

// The operand of fragment f of four. both: the low bytes of its pair.
__device__ __forceinline__ void assemble(const Matrix& m, int f, uint32_t first, uint32_t second, const uint4& both, uint32_t sign,
                                         uint32_t (&a)[4]) {
  const uint32_t top = permute(m.uppers.x, m.uppers.y, first) | ((sign << (2 * f)) & 0x80808080);
  const uint32_t bottom = permute(m.uppers.x, m.uppers.y, second) | ((sign << (2 * f + 1)) & 0x80808080);
  const uint32_t low_top = f & 1 ? both.z : both.x, low_bottom = f & 1 ? both.w : both.y;
  a[0] = permute(low_top, top, 0x5140), a[1] = permute(low_bottom, bottom, 0x5140);
  a[2] = permute(low_top, top, 0x7362), a[3] = permute(low_bottom, bottom, 0x7362);
}

// The operands of a tile's fragments, one after the other: use(fragment, a, selectors of the two groups). The lane 4 g + t gets
// columns 4 t .. 4 t + 3 of rows g and g + 8, as if they were columns 2 t, 2 t + 1, 2 t + 8, 2 t + 9 of mma.m16n8k16: the other
// operand takes the same order.
template <bool kDeep, class Use>
__device__ __forceinline__ void decode(const Matrix& m, const uint32_t (*codes)[kLanes], const uint32_t* table, int lane,
                                       Reader<kDeep>& reader, Use use) {
  // Bit 2 of a window is the first of a code, so that masked it is the place of a table entry in bytes. So positions begin two bits
  // before the codes, in the row before the first. They are kept in quarters of a bit on top of the address of the codes: without its
  // last seven bits such a position is the address of a row. (The shuffle keeps the compiler from computing `column` in the loop.)
  const uint32_t entries = address(table), column = __shfl_sync(~0u, 4 * lane, lane);  // of 16 KB, aligned to 16 KB
  uint32_t position = address(codes) - 4 * kLanes + 4 * 30;
#pragma unroll 1
  for (int four = 0; four < m.fragments; four += 4) {
#pragma unroll
    for (int f = 0; f < 4; f++) {
      uint32_t first, second, a[4];
      look_up(position, column, entries, first, second);
      const uint4 both = reader.low[f / 2];
      assemble(m, f, first, second, both, reader.sign, a);
      if (f & 1) reader.next_low(f / 2);
      if (f == 3) reader.next_sign();
      use(four + f, f, a, first, second);
    }
  }
}

// Dynamic shared memory begins at 1 KB, behind what the system keeps of every block from compute capability 8.0 on: up to the next
// multiple of 16 KB it is kPadding. (A __trap() where that is not so changed the registers of all kernels.)
constexpr int kPadding = 15 * 1024;
__device__ __forceinline__ Shared& shared() {
  extern __shared__ __align__(128) unsigned char raw[];
  return *reinterpret_cast<Shared*>(raw + (-address(raw) & 16 * 1024 - 1));
}

// A warp's run of a thread block's n tiles.
__device__ __forceinline__ int run_start(int n, int warp, int warps) { return int(int64_t(n) * warp / warps); }

__device__ __forceinline__ void load_table(const Matrix& m, uint32_t* to) {
  for (int i = threadIdx.x; i < kTable / 4; i += blockDim.x) copy16(address(to + 4 * i), m.table + 4 * i);
}

// With programmatic dependent launch a kernel begins while the one before it ends: until here it may not read what that one writes,
// nor write.
__device__ __forceinline__ void wait_for_the_kernel_before() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Rows of tiles [top, bottom) times columns of tiles [left, right) where x has (or, in tiled_wide, sums have) an Inf or a NaN. One of x
// must not meet the +0.0 that stands for an escaped weight or that fills up an operand: products and sums are made one by one. Slow.
template <class Put>
__device__ __noinline__ void careful(const Matrix& m, Shared& s, uint32_t (*codes)[kLanes], const __nv_bfloat16* x, int batch, int top,
                                     int bottom, int left, int right, Put put) {
  const int warp = threadIdx.x / kLanes, lane = threadIdx.x % kLanes, warps = blockDim.x / kLanes, g = lane / 4, t = lane % 4;
  const int across = m.across();
  for (int row_of_tiles = warp; row_of_tiles < bottom - top; row_of_tiles += warps)
    for (int n = 0; n < batch; n++) {
      const __nv_bfloat16* const row = x + int64_t(n) * m.columns;
      float sums[2] = {}, escaped[2] = {};
      for (int column = left; column < right; column++) {
        const int tile = (top + row_of_tiles) * across + column, from = column * 16 * m.fragments;
        const uint2 h0 = __ldg(m.tiles + tile), h1 = __ldg(m.tiles + tile + 1);
        Reader<false> reader(m, tile, tile + 1, lane);
        fetch(m, h0.x, h1.x - h0.x, codes, lane);
        spread(h1.x - h0.x, codes, lane);
        decode(m, codes, s.table, lane, reader, [&](int f, int, const uint32_t(&a)[4], uint32_t first, uint32_t second) {
#pragma unroll
          for (int k = 0; k < 4; k++) {
            const int at = from + 16 * f + 4 * t + k;
            if (at >= m.columns) break;
            const float one = __bfloat162float(row[at]);
            if ((first >> 4 * k & 7) != 7) sums[0] += value(a[k / 2 * 2] >> 16 * (k & 1) & 0xFFFF) * one;
            if ((second >> 4 * k & 7) != 7) sums[1] += value(a[k / 2 * 2 + 1] >> 16 * (k & 1) & 0xFFFF) * one;
          }
        });
        __syncwarp();
        for (uint32_t k = h0.y; k < h1.y; k++) {
          const uint32_t patch = __ldg(m.patches + k);
          const float product = value(patch & 0xFFFF) * __bfloat162float(row[from + (patch >> 16 & 0xFFF)]);
          if (int(patch >> 28) == g) escaped[0] += product;
          if (int(patch >> 28) == g + 8) escaped[1] += product;
        }
      }
#pragma unroll
      for (int i = 0; i < 2; i++) {
#pragma unroll
        for (int d = 1; d < 4; d *= 2) sums[i] += __shfl_xor_sync(~0u, sums[i], d);
        if (t == 0) put(row_of_tiles * kTileRows + g + 8 * i, n, sums[i] + escaped[i]);
      }
    }
}

}  // namespace tiled
