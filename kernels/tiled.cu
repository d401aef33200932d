// The tiled layout (docs/format.md): y = W x + bias at batch 1 without W ever in memory, and decompression.
//
//   nvcc -O3 -std=c++17 -arch=sm_90 -cubin -o tiled.cubin tiled.cu        (sm_80: the same with -arch=sm_80)
//
// A warp takes a run of tiles. While it decodes one, the codes of the next and its part of x are on their way to the warp's other
// stage of shared memory (cp.async); low bytes and signs, whose places are known ahead, come straight to registers, four fragments
// ahead. One table lookup gives the upper bytes of four weights: two lookups and four byte permutations fill the A operand of an
// mma.sync. A thread block takes whole rows of tiles, so that sums meet in shared memory and are added in a fixed order: the same
// bits in every run.
#include <cuda_bf16.h>

#include <cstdint>

namespace tiled {

constexpr int kLanes = 32;
constexpr int kTileRows = 16;
constexpr int kMostFragments = 36;
constexpr int kMostRows = 28;  // of the stream of a tile: 2 * 36 codes of 12 bits, and a row that is read and not used
constexpr int kTable = 1 << 12;

struct Matrix {
  const uint8_t* low;       // [tiles, F / 2, 32, 16]
  const uint32_t* sign;     // [tiles, F / 4, 32]
  const uint32_t* stream;   // [rows, 32]
  const uint2* tiles;       // [tiles + 1]: first row of the stream, first patch
  const uint32_t* patches;  // row << 28 | column << 16 | pattern
  const uint32_t* table;    // [4096]
  uint2 uppers;             // byte of each rank
  int32_t rows, columns, fragments;
};

// What a warp has of one tile in shared memory. The row before the codes is read too, and not used.
struct Stage {
  uint2 x[kMostFragments][4];  // four columns each
  uint32_t codes[kMostRows][kLanes];
};

template <int kWarps>
struct Shared {
  uint32_t table[kTable];
  Stage stages[kWarps][2];
  float sums[kWarps][2][kTileRows];  // of the first and of the last row of tiles that a warp has a part of
};

__device__ __forceinline__ uint32_t address(const void* p) { return uint32_t(__cvta_generic_to_shared(p)); }
__device__ __forceinline__ void copy16(void* to, const void* from, int bytes = 16) {  // the rest of the 16 becomes zero
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address(to)), "l"(from), "r"(bytes) : "memory");
}
template <int kPending>
__device__ __forceinline__ void wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
  __syncwarp();
}
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

// Low bytes and signs of the next four fragments. They lie without gaps over all tiles, so a run of tiles is read straight on.
struct Ahead {
  uint4 low[2];
  uint32_t sign;
};

struct Reader {
  const uint4* low;
  const uint32_t* sign;
  const uint32_t* end;  // of sign
  __device__ __forceinline__ Reader(const Matrix& m, int first, int last, int lane)
      : low(reinterpret_cast<const uint4*>(m.low) + int64_t(first) * m.fragments * 16 + lane),
        sign(m.sign + int64_t(first) * m.fragments * 8 + lane),
        end(m.sign + int64_t(last) * m.fragments * 8) {}
  __device__ __forceinline__ void next(Ahead& a) {
    if (sign < end) {
      a.low[0] = __ldcs(low);
      a.low[1] = __ldcs(low + kLanes);
      a.sign = __ldcs(sign);
    }
    low += 2 * kLanes;
    sign += kLanes;
  }
};

// A tile's codes and its part of x on their way to a stage.
template <bool kProduct>
__device__ __forceinline__ void fetch(const Matrix& m, uint32_t row, uint32_t rows, int left, const __nv_bfloat16* x, Stage& s, int lane) {
  const uint32_t* const codes = m.stream + int64_t(row) * kLanes + 4 * lane;
  uint32_t* const to = &s.codes[0][4 * lane];
  for (uint32_t i = lane / 8, k = 0; i < rows; i += 4, k += 4 * kLanes) copy16(to + k, codes + k);
  if (kProduct)
    for (int i = lane; i < 2 * m.fragments; i += kLanes) {
      const int column = left + 8 * i;
      copy16(&s.x[i / 2][i % 2 * 2], x + (column < m.columns ? column : 0), min(max(m.columns - column, 0), 8) * 2);
    }
  asm volatile("cp.async.commit_group;" ::: "memory");
}

// The operands of a tile's fragments, one after the other: use(fragment, a). The lane 4 g + t gets columns 4 t .. 4 t + 3 of rows g
// and g + 8, as if they were columns 2 t, 2 t + 1, 2 t + 8, 2 t + 9 of mma.m16n8k16: the other operand takes the same order.
template <class Use>
__device__ __forceinline__ void decode(const Stage& s, const uint32_t* table, uint2 uppers, int fragments, int lane, Reader& reader,
                                       Ahead& ahead, Use use) {
  // Bit 2 of a window is the first of a code, so that masked it is the place of a table entry in bytes. So positions begin two bits
  // before the codes, in the row before the first.
  uint32_t position = 30;
  const uint32_t* const rows = &s.codes[0][lane] - kLanes;
  const char* const entries = reinterpret_cast<const char*>(table);
  for (int four = 0; four < fragments; four += 4) {
    const Ahead now = ahead;
    reader.next(ahead);
#pragma unroll
    for (int f = 0; f < 4; f++) {
      const uint32_t* const at = rows + (position >> 5) * kLanes;
      uint32_t window = __funnelshift_r(at[0], at[kLanes], position);
      const uint32_t first = *reinterpret_cast<const uint32_t*>(entries + (window & 0x3FFC));
      window >>= first >> 16;
      const uint32_t second = *reinterpret_cast<const uint32_t*>(entries + (window & 0x3FFC));
      position += (first + second) >> 16;
      const uint32_t top = permute(uppers.x, uppers.y, first) | ((now.sign << (2 * f)) & 0x80808080);
      const uint32_t bottom = permute(uppers.x, uppers.y, second) | ((now.sign << (2 * f + 1)) & 0x80808080);
      const uint4 both = now.low[f / 2];
      const uint32_t low_top = f & 1 ? both.z : both.x, low_bottom = f & 1 ? both.w : both.y;
      const uint32_t a[4] = {permute(low_top, top, 0x5140), permute(low_bottom, bottom, 0x5140), permute(low_top, top, 0x7362),
                             permute(low_bottom, bottom, 0x7362)};
      use(four + f, a);
    }
  }
}

// A warp's run of a thread block's tiles [begin, end).
__device__ __forceinline__ int run_start(int begin, int end, int warp, int warps) {
  return begin + int(int64_t(end - begin) * warp / warps);
}

template <int kWarps>
__device__ __forceinline__ void load_table(const Matrix& m, uint32_t* to) {
  for (int i = threadIdx.x; i < kTable / 4; i += kWarps * kLanes)
    copy16(to + 4 * i, m.table + 4 * i);
  asm volatile("cp.async.commit_group;" ::: "memory");
}

template <int kWarps>
__device__ __forceinline__ void product(const Matrix& m, const __nv_bfloat16* x, const __nv_bfloat16* bias, __nv_bfloat16* y) {
  extern __shared__ __align__(16) unsigned char raw[];
  Shared<kWarps>& s = *reinterpret_cast<Shared<kWarps>*>(raw);
  const int warp = threadIdx.x / kLanes, lane = threadIdx.x % kLanes, g = lane / 4, t = lane % 4;
  const int width = 16 * m.fragments, across = (m.columns + width - 1) / width, down = (m.rows + kTileRows - 1) / kTileRows;
  const int top = int(int64_t(down) * blockIdx.x / gridDim.x), bottom = int(int64_t(down) * (blockIdx.x + 1) / gridDim.x);
  const int begin = top * across, end = bottom * across;
  const int first = run_start(begin, end, warp, kWarps), last = run_start(begin, end, warp + 1, kWarps);
  const auto put = [&](int row, float sum) {
    if (row < m.rows) y[row] = __float2bfloat16(bias ? sum + __bfloat162float(bias[row]) : sum);
  };

  // h: where the tile starts, and the two after it.
  uint2 h[3];
#pragma unroll
  for (int i = 0; i < 3; i++) h[i] = __ldg(m.tiles + min(first + i, last));
  Reader reader(m, first, last, lane);
  Ahead ahead = {};
  reader.next(ahead);
  int left = first % across * width, next_left = left;
  load_table<kWarps>(m, s.table);
  if (first < last) fetch<true>(m, h[0].x, h[1].x - h[0].x, left, x, s.stages[warp][0], lane);
  wait<0>();
  __syncthreads();

  float c[4] = {};
  for (int tile = first; tile < last; tile++) {
    Stage& stage = s.stages[warp][(tile - first) & 1];
    left = next_left;
    next_left = left + width < m.columns ? left + width : 0;
    if (tile + 1 < last) fetch<true>(m, h[1].x, h[2].x - h[1].x, next_left, x, s.stages[warp][(tile + 1 - first) & 1], lane);
    const uint2 later = __ldg(m.tiles + min(tile + 3, last));
    const uint32_t patches = h[1].y - h[0].y;
    uint32_t patch = 0;
    if (uint32_t(lane) < patches) patch = __ldg(m.patches + h[0].y + lane);
    decode(stage, s.table, m.uppers, m.fragments, lane, reader, ahead, [&](int f, const uint32_t(&a)[4]) {
      uint2 b = make_uint2(0, 0);
      if (g == 0) b = stage.x[f][t];
      mma(c, a, b);
    });
    // What is missing of each row, in the order of the patches.
    for (uint32_t from = 0; from < patches; from += kLanes) {
      if (from && from + lane < patches) patch = __ldg(m.patches + h[0].y + from + lane);
      const float add = value(patch & 0xFFFF) * __bfloat162float(reinterpret_cast<const __nv_bfloat16*>(stage.x)[patch >> 16 & 0xFFF]);
      for (uint32_t k = 0; k < min(patches - from, uint32_t(kLanes)); k++) {
        const uint32_t row = __shfl_sync(~0u, patch, k) >> 28;
        const float one = __shfl_sync(~0u, add, k);
        const float own = t == 0 && g == int(row & 7) ? one : 0;
        c[0] += row < 8 ? own : 0;
        c[2] += row < 8 ? 0 : own;
      }
    }
    const bool ends = next_left == 0;
    if (ends || tile + 1 == last) {
      const int row_of_tiles = tile / across;
      if (t == 0) {
        if (ends && first <= row_of_tiles * across) {
          put(row_of_tiles * kTileRows + g, c[0]);
          put(row_of_tiles * kTileRows + g + 8, c[2]);
        } else {
          float(&sums)[kTileRows] = s.sums[warp][row_of_tiles != first / across];
          sums[g] = c[0];
          sums[g + 8] = c[2];
        }
      }
      c[0] = c[1] = c[2] = c[3] = 0;
    }
    h[0] = h[1], h[1] = h[2], h[2] = later;
    wait<0>();  // the next tile is there, this one's stage free
  }
  __syncthreads();
  // Rows of tiles that several warps share: their parts in the order of the warps.
  for (int i = threadIdx.x; i < (bottom - top) * kTileRows; i += kWarps * kLanes) {
    const int row_of_tiles = top + i / kTileRows, from = row_of_tiles * across, to = from + across;
    float sum = 0;
    bool whole = false;
    for (int w = 0; w < kWarps; w++) {
      const int a = run_start(begin, end, w, kWarps), b = run_start(begin, end, w + 1, kWarps);
      whole |= a <= from && to <= b;
      if (a < b && a < to && from < b) sum += s.sums[w][row_of_tiles != a / across][i % kTileRows];
    }
    if (!whole) put(row_of_tiles * kTileRows + i % kTileRows, sum);
  }
}

template <int kWarps>
__device__ __forceinline__ void decompress(const Matrix& m, uint16_t* out) {
  extern __shared__ __align__(16) unsigned char raw[];
  Shared<kWarps>& s = *reinterpret_cast<Shared<kWarps>*>(raw);
  const int warp = threadIdx.x / kLanes, lane = threadIdx.x % kLanes, g = lane / 4, t = lane % 4;
  const int width = 16 * m.fragments, across = (m.columns + width - 1) / width, down = (m.rows + kTileRows - 1) / kTileRows;
  const int all = down * across, runs = gridDim.x * kWarps;
  const int first = run_start(0, all, blockIdx.x * kWarps + warp, runs), last = run_start(0, all, blockIdx.x * kWarps + warp + 1, runs);
  uint2 h[3];
#pragma unroll
  for (int i = 0; i < 3; i++) h[i] = __ldg(m.tiles + min(first + i, last));
  Reader reader(m, first, last, lane);
  Ahead ahead = {};
  reader.next(ahead);
  load_table<kWarps>(m, s.table);
  if (first < last) fetch<false>(m, h[0].x, h[1].x - h[0].x, 0, nullptr, s.stages[warp][0], lane);
  wait<0>();
  __syncthreads();
  const bool even = m.columns % 4 == 0;
  for (int tile = first; tile < last; tile++) {
    Stage& stage = s.stages[warp][(tile - first) & 1];
    if (tile + 1 < last) fetch<false>(m, h[1].x, h[2].x - h[1].x, 0, nullptr, s.stages[warp][(tile + 1 - first) & 1], lane);
    const uint2 later = __ldg(m.tiles + min(tile + 3, last));
    const int row = tile / across * kTileRows, left = tile % across * width;
    uint16_t* const upper = out + int64_t(row + g) * m.columns + left + 4 * t;
    uint16_t* const lower = upper + int64_t(8) * m.columns;
    const bool inside = row + kTileRows <= m.rows && left + width <= m.columns && even;
    decode(stage, s.table, m.uppers, m.fragments, lane, reader, ahead, [&](int f, const uint32_t(&a)[4]) {
      if (inside) {
        __stcs(reinterpret_cast<uint2*>(upper + 16 * f), make_uint2(a[0], a[2]));
        __stcs(reinterpret_cast<uint2*>(lower + 16 * f), make_uint2(a[1], a[3]));
      } else {
#pragma unroll
        for (int i = 0; i < 4; i++) {
          if (left + 16 * f + 4 * t + i >= m.columns) break;
          if (row + g < m.rows) upper[16 * f + i] = uint16_t(a[i / 2 * 2] >> 16 * (i & 1));
          if (row + g + 8 < m.rows) lower[16 * f + i] = uint16_t(a[i / 2 * 2 + 1] >> 16 * (i & 1));
        }
      }
    });
    __syncwarp();
    for (uint32_t k = h[0].y + lane; k < h[1].y; k += kLanes) {
      const uint32_t patch = __ldg(m.patches + k);
      out[int64_t(row + (patch >> 28)) * m.columns + left + (patch >> 16 & 0xFFF)] = uint16_t(patch);
    }
    h[0] = h[1], h[1] = h[2], h[2] = later;
    wait<0>();
  }
}

}  // namespace tiled

#ifndef WARPS
#define WARPS 16
#endif
constexpr int kWarps = WARPS;

extern "C" __constant__ const int tiled_product_launch[] = {kWarps * tiled::kLanes, int(sizeof(tiled::Shared<kWarps>)), 1};
extern "C" __constant__ const int tiled_decompress_launch[] = {kWarps * tiled::kLanes, int(sizeof(tiled::Shared<kWarps>)), 1};

extern "C" __global__ void __launch_bounds__(kWarps* tiled::kLanes, 1)
tiled_product(const __grid_constant__ tiled::Matrix m, const __nv_bfloat16* x, const __nv_bfloat16* bias, __nv_bfloat16* y) {
  tiled::product<kWarps>(m, x, bias, y);
}

extern "C" __global__ void __launch_bounds__(kWarps* tiled::kLanes, 1)
tiled_decompress(const __grid_constant__ tiled::Matrix m, uint16_t* out) {
  tiled::decompress<kWarps>(m, out);
}
