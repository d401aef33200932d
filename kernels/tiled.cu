// The tiled layout (docs/format.md): y = W x + bias at batch 1 without W ever in memory, and decompression.
//
//   nvcc -O3 -std=c++17 -arch=sm_90 -cubin -o tiled.cubin tiled.cu        (sm_80: the same with -arch=sm_80)
//
// A warp takes a run of tiles. While it decodes one, the next lies under way in its other stage of shared memory (cp.async): low
// bytes, signs, codes, and the tile's part of x. One table lookup gives the upper bytes of four weights, already where mma.sync wants
// them: two lookups and four byte permutations fill the A operand. A thread block takes whole rows of tiles, so sums meet in shared
// memory and are added in a fixed order: the same bits in every run.
#include <cuda_bf16.h>

#include <cstdint>

namespace tiled {

constexpr int kLanes = 32;
constexpr int kTileRows = 16;
constexpr int kMostFragments = 16;
constexpr int kTableBytes = 4 << 12;

struct Matrix {
  const uint8_t* low;       // [tiles, F / 2, 32, 16]
  const uint32_t* sign;     // [tiles, F / 4, 32]
  const uint32_t* stream;   // [words], 16-byte aligned
  const uint2* tiles;       // [tiles + 1]: start of the stream / 4, first patch
  const uint8_t* counts;    // [tiles]: whole rows, further rows << 4
  const uint32_t* patches;  // row << 28 | column << 16 | pattern
  const uint32_t* table;    // [4096], 16-byte aligned
  uint2 uppers;             // byte of each rank
  int32_t rows, columns, fragments;
};

// What a warp has of one tile in shared memory. The codes come last but for x: what lies before and behind them is read (and not used).
template <int kWords>
struct Stage {
  uint4 low[kMostFragments / 2][kLanes];
  uint32_t sign[kMostFragments / 4][kLanes];
  uint2 x[kMostFragments][4];  // four columns each
  uint32_t codes[kWords];
};

__device__ __forceinline__ uint32_t address(const void* p) { return uint32_t(__cvta_generic_to_shared(p)); }
__device__ __forceinline__ uint32_t load(uint32_t at) {
  uint32_t value;
  asm volatile("ld.shared.b32 %0, [%1];" : "=r"(value) : "r"(at));
  return value;
}
__device__ __forceinline__ void copy16(uint32_t to, const void* from, int bytes = 16) {  // the rest of the 16 becomes zero
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes) : "memory");
}
template <int kPending>
__device__ __forceinline__ void wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
  __syncwarp();
}
__device__ __forceinline__ void mma(float (&c)[4], const uint32_t (&a)[4], uint2 b) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b.x), "r"(b.y));
}
__device__ __forceinline__ uint32_t permute(uint32_t x, uint32_t y, uint32_t selector) {  // __byte_perm without masking the selector
  uint32_t out;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(out) : "r"(x), "r"(y), "r"(selector));
  return out;
}
__device__ __forceinline__ float value(uint32_t pattern) { return __uint_as_float(pattern << 16); }

// Where a warp is in its run of tiles, with the headers of the next 31 in its lanes.
struct Headers {
  const Matrix& m;
  int first, last, lane;
  uint2 tile;
  uint32_t counts;
  __device__ __forceinline__ Headers(const Matrix& m, int first, int last, int lane) : m(m), last(last), lane(lane) { reload(first); }
  __device__ __forceinline__ void reload(int from) {
    first = from;
    const int at = min(first + lane, last);
    tile = __ldg(m.tiles + at);
    counts = __ldg(m.counts + min(at, last - 1));
  }
  __device__ __forceinline__ void reach(int t) {  // t and t + 1 become available
    if (t + 1 >= first + kLanes) reload(t);
  }
  __device__ __forceinline__ uint32_t start(int t) const { return __shfl_sync(~0u, tile.x, t - first); }
  __device__ __forceinline__ uint32_t patch(int t) const { return __shfl_sync(~0u, tile.y, t - first); }
  __device__ __forceinline__ uint32_t rows(int t) const { return __shfl_sync(~0u, counts, t - first); }
};

// Everything of a tile on its way to a stage, and its first 32 patches to registers.
struct Arriving {
  uint32_t words, rows, patch, patches, mine;
};

template <int kWords, bool kProduct>
__device__ __forceinline__ Arriving fetch(const Matrix& m, Headers& h, int tile, int across, const __nv_bfloat16* x, Stage<kWords>& s,
                                          int lane) {
  h.reach(tile);
  const uint32_t start = h.start(tile), patch = h.patch(tile);
  Arriving a = {4 * (h.start(tile + 1) - start), h.rows(tile), patch, h.patch(tile + 1) - patch, 0};
  const int f = m.fragments;
  const uint4* const low = reinterpret_cast<const uint4*>(m.low) + int64_t(tile) * (f * 16) + lane;
  for (int i = 0; i < f / 2; i++) copy16(address(&s.low[i][lane]), low + i * kLanes);
  if (lane < 2 * f) copy16(address(&s.sign[0][4 * lane]), m.sign + int64_t(tile) * (f * 8) + 4 * lane);
  const uint32_t* const codes = m.stream + int64_t(start) * 4;
  for (uint32_t i = 4 * lane; i < a.words; i += 4 * kLanes) copy16(address(&s.codes[i]), codes + i);
  if (kProduct && lane < 2 * f) {
    const int column = tile % across * f * 16 + 8 * lane;
    copy16(address(&s.x[lane / 2][lane % 2 * 2]), x + (column < m.columns ? column : 0), min(max(m.columns - column, 0), 8) * 2);
  }
  asm volatile("cp.async.commit_group;" ::: "memory");
  if (uint32_t(lane) < a.patches) a.mine = __ldg(m.patches + patch + lane);
  return a;
}

// Behind the rows that all lanes have, words lie without gaps, a mask for each row at the end: put them where their lanes look.
template <int kWords>
__device__ __forceinline__ void spread(Stage<kWords>& s, const Arriving& a, int lane) {
  const uint32_t full = a.rows & 15, ragged = a.rows >> 4;
  if (ragged == 0) return;
  const uint32_t mask = uint32_t(lane) < ragged ? s.codes[a.words - ragged + lane] : 0;
  uint32_t at = full * kLanes + __reduce_add_sync(~0u, __popc(mask));
  for (int k = int(ragged) - 1; k >= 0; k--) {  // the last row first: a row's place never lies before what is still to be read
    const uint32_t own = __shfl_sync(~0u, mask, k);
    at -= __popc(own);
    const uint32_t word = s.codes[at + __popc(own & ((1u << lane) - 1))];
    __syncwarp();
    s.codes[(full + k) * kLanes + lane] = word;
    __syncwarp();
  }
}

// The operands of a tile's fragments, one after the other: use(fragment, a), a as mma.m16n8k16 takes it, with the columns of a fragment
// in the order 0 1 8 9 | 2 3 10 11 ... replaced by four neighbours a lane.
template <int kWords, class Use>
__device__ __forceinline__ void decode(const Stage<kWords>& s, uint32_t table, uint2 uppers, int fragments, int lane, Use use) {
  // Bit 2 of a window is the first of a code, so that masked it is the place of a table entry. So positions begin two bits before the
  // codes: in the row before the first, of which nothing is used.
  uint32_t position = 30;
  const uint32_t rows = address(s.codes) - 4 * kLanes + 4 * lane;
  for (int four = 0; four < fragments / 4; four++) {
    const uint32_t sign = s.sign[four][lane];
#pragma unroll
    for (int f = 0; f < 4; f++) {
      const uint32_t at = rows + (position >> 5) * (4 * kLanes);
      uint32_t window = __funnelshift_r(load(at), load(at + 4 * kLanes), position);
      const uint32_t first = load(table + (window & 0x3FFC));
      window >>= first >> 16;
      const uint32_t second = load(table + (window & 0x3FFC));
      position += (first + second) >> 16;
      const uint32_t top = permute(uppers.x, uppers.y, first) | ((sign << (2 * f)) & 0x80808080);
      const uint32_t bottom = permute(uppers.x, uppers.y, second) | ((sign << (2 * f + 1)) & 0x80808080);
      const uint4 both = s.low[four * 2 + f / 2][lane];
      const uint32_t low_top = f & 1 ? both.z : both.x, low_bottom = f & 1 ? both.w : both.y;
      const uint32_t a[4] = {__byte_perm(low_top, top, 0x5140), __byte_perm(low_bottom, bottom, 0x5140),
                             __byte_perm(low_top, top, 0x7362), __byte_perm(low_bottom, bottom, 0x7362)};
      use(four * 4 + f, a);
    }
  }
}

// A warp's run of a thread block's tiles [begin, end).
__device__ __forceinline__ int run_start(int begin, int end, int warp, int warps) {
  return begin + int(int64_t(end - begin) * warp / warps);
}

template <int kWarps, int kWords>
struct Shared {
  uint32_t table[1 << 12];
  Stage<kWords> stages[kWarps][2];
  float sums[kWarps][2][kTileRows];  // of the first and of the last row of tiles that a warp has a part of
};

template <int kWarps, int kWords>
__device__ __forceinline__ void product(const Matrix& m, const __nv_bfloat16* x, const __nv_bfloat16* bias, __nv_bfloat16* y) {
  extern __shared__ __align__(16) unsigned char raw[];
  using Memory = Shared<kWarps, kWords>;
  Memory& s = *reinterpret_cast<Memory*>(raw);
  const int warp = threadIdx.x / kLanes, lane = threadIdx.x % kLanes, g = lane / 4, t = lane % 4;
  const int across = (m.columns + 16 * m.fragments - 1) / (16 * m.fragments), down = (m.rows + kTileRows - 1) / kTileRows;
  const int top = int(int64_t(down) * blockIdx.x / gridDim.x), bottom = int(int64_t(down) * (blockIdx.x + 1) / gridDim.x);
  const int begin = top * across, end = bottom * across;
  const int first = run_start(begin, end, warp, kWarps), last = run_start(begin, end, warp + 1, kWarps);
  const auto put = [&](int row, float sum) {
    if (row < m.rows) y[row] = __float2bfloat16(bias ? sum + __bfloat162float(bias[row]) : sum);
  };

  Headers headers(m, first, max(last, first + 1), lane);
  Arriving next = {};
  if (first < last) next = fetch<kWords, true>(m, headers, first, across, x, s.stages[warp][0], lane);
  for (int i = threadIdx.x; i < kTableBytes / 16; i += kWarps * kLanes)
    reinterpret_cast<uint4*>(s.table)[i] = __ldg(reinterpret_cast<const uint4*>(m.table) + i);
  __syncthreads();

  const uint32_t table = address(s.table);
  float c[4] = {};
  for (int tile = first; tile < last; tile++) {
    const Arriving here = next;
    Stage<kWords>& stage = s.stages[warp][(tile - first) & 1];
    if (tile + 1 < last) {
      next = fetch<kWords, true>(m, headers, tile + 1, across, x, s.stages[warp][(tile + 1 - first) & 1], lane);
      wait<1>();
    } else {
      wait<0>();
    }
    spread(stage, here, lane);
    decode(stage, table, m.uppers, m.fragments, lane, [&](int f, const uint32_t(&a)[4]) {
      uint2 b = make_uint2(0, 0);
      if (g == 0) b = stage.x[f][t];
      mma(c, a, b);
    });
    for (uint32_t k = 0; k < here.patches; k++) {
      const uint32_t patch = k < kLanes ? __shfl_sync(~0u, here.mine, k) : __ldg(m.patches + here.patch + k);
      const int row = patch >> 28, column = patch >> 16 & 0xFFF;
      const float add = value(patch & 0xFFFF) * __bfloat162float(reinterpret_cast<const __nv_bfloat16*>(stage.x)[column]);
      const float own = t == 0 && g == (row & 7) ? add : 0;
      c[0] += row < 8 ? own : 0;
      c[2] += row < 8 ? 0 : own;
    }
    __syncwarp();  // the stage may be overwritten
    if ((tile + 1) % across == 0 || tile + 1 == last) {
      const int row_of_tiles = tile / across;
      if (t == 0) {
        const bool whole = (tile + 1) % across == 0 && first <= row_of_tiles * across;
        if (whole) {
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
      if (a < to && from < b) sum += s.sums[w][row_of_tiles != a / across][i % kTileRows];
    }
    if (!whole) put(row_of_tiles * kTileRows + i % kTileRows, sum);
  }
}

template <int kWarps, int kWords>
__device__ __forceinline__ void decompress(const Matrix& m, uint16_t* out) {
  extern __shared__ __align__(16) unsigned char raw[];
  using Memory = Shared<kWarps, kWords>;
  Memory& s = *reinterpret_cast<Memory*>(raw);
  const int warp = threadIdx.x / kLanes, lane = threadIdx.x % kLanes, g = lane / 4, t = lane % 4;
  const int across = (m.columns + 16 * m.fragments - 1) / (16 * m.fragments), down = (m.rows + kTileRows - 1) / kTileRows;
  const int all = down * across, runs = gridDim.x * kWarps;
  const int first = run_start(0, all, blockIdx.x * kWarps + warp, runs), last = run_start(0, all, blockIdx.x * kWarps + warp + 1, runs);
  Headers headers(m, first, max(last, first + 1), lane);
  Arriving next = {};
  if (first < last) next = fetch<kWords, false>(m, headers, first, across, nullptr, s.stages[warp][0], lane);
  for (int i = threadIdx.x; i < kTableBytes / 16; i += kWarps * kLanes)
    reinterpret_cast<uint4*>(s.table)[i] = __ldg(reinterpret_cast<const uint4*>(m.table) + i);
  __syncthreads();
  const uint32_t table = address(s.table);
  const bool even = m.columns % 4 == 0;
  for (int tile = first; tile < last; tile++) {
    const Arriving here = next;
    Stage<kWords>& stage = s.stages[warp][(tile - first) & 1];
    if (tile + 1 < last) {
      next = fetch<kWords, false>(m, headers, tile + 1, across, nullptr, s.stages[warp][(tile + 1 - first) & 1], lane);
      wait<1>();
    } else {
      wait<0>();
    }
    spread(stage, here, lane);
    const int row = tile / across * kTileRows, left = tile % across * m.fragments * 16;
    uint16_t* const upper = out + int64_t(row + g) * m.columns + left + 4 * t;
    uint16_t* const lower = upper + int64_t(8) * m.columns;
    const bool inside = row + kTileRows <= m.rows && left + 16 * m.fragments <= m.columns && even;
    decode(stage, table, m.uppers, m.fragments, lane, [&](int f, const uint32_t(&a)[4]) {
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
    for (uint32_t k = lane; k < here.patches; k += kLanes) {
      const uint32_t patch = k < kLanes ? here.mine : __ldg(m.patches + here.patch + k);
      out[int64_t(row + (patch >> 28)) * m.columns + left + (patch >> 16 & 0xFFF)] = uint16_t(patch);
    }
    __syncwarp();
  }
}

}  // namespace tiled

constexpr int kWarps = 16;
constexpr int kWords = 352;  // of codes in a stage
using TiledShared = tiled::Shared<kWarps, kWords>;

extern "C" __constant__ const int tiled_product_launch[] = {kWarps * tiled::kLanes, int(sizeof(TiledShared)), 1};
extern "C" __constant__ const int tiled_decompress_launch[] = {kWarps * tiled::kLanes, int(sizeof(TiledShared)), 1};

extern "C" __global__ void __launch_bounds__(kWarps* tiled::kLanes, 1)
tiled_product(const __grid_constant__ tiled::Matrix m, const __nv_bfloat16* x, const __nv_bfloat16* bias, __nv_bfloat16* y) {
  tiled::product<kWarps, kWords>(m, x, bias, y);
}

extern "C" __global__ void __launch_bounds__(kWarps* tiled::kLanes, 1) tiled_decompress(const __grid_constant__ tiled::Matrix m, uint16_t* out) {
  tiled::decompress<kWarps, kWords>(m, out);
}
