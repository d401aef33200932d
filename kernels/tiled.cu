// The tiled layout (docs/format.md): y = x W^T + bias for up to 64 rows of x without W ever in memory, and decompression.
//
//   nvcc -O3 -std=c++17 -arch=sm_90 -cubin -o tiled.cubin tiled.cu        (sm_80: the same with -arch=sm_80)
//
// A warp takes a run of tiles. The codes of a tile come to shared memory at once; its low bytes and signs, whose places are known
// ahead, straight to registers, as soon as these are free. One table lookup gives the upper bytes of four weights: two lookups and
// four byte permutations fill the A operand of an mma.sync. Sums of several warps meet in shared memory, those of several thread
// blocks in device memory, and are added in a fixed order: the same bits in every run.
#include "tiled.cuh"

namespace tiled {

constexpr int kProductWarps = 24;  // with 80 registers a thread it is a tenth faster than with 72

__device__ __forceinline__ bool finite(uint32_t two) {
  return (two & 0x7F80) != 0x7F80 && (two & 0x7F800000) != 0x7F800000;
}

// Where column i of x lies in shared memory: the four columns of a lane of one fragment beside those of the next.
__device__ __forceinline__ int place(int i) { return (i & ~31) | (i & 12) << 1 | (i & 16) >> 2 | (i & 3); }

// The sums of a warp's run of tiles, for one row of x.
template <class Put>
__device__ __forceinline__ void run(const Matrix& m, Shared& s, uint32_t (*codes)[kLanes], const uint4* x, int begin, int first, int last,
                                    Reader<false>& reader, uint2 h0, uint2 h1, Put put) {
  const int warp = threadIdx.x / kLanes, lane = threadIdx.x % kLanes, g = lane / 4, t = lane % 4;
  const int across = m.across();
  int row_of_tiles = first / across, column = first % across;
  float(*sums)[kTileRows] = s.sums[warp];
  bool whole = column == 0;  // this row of tiles is the warp's from its first tile on
  float c[4] = {};
  for (int tile = first; tile < last; tile++) {
    const bool more = tile + 1 < last;
    uint2 h2 = h1;
    if (more) h2 = __ldg(m.tiles + begin + tile + 2);
    uint32_t patch = 0;
    if (h0.y + lane < h1.y && lane < 16) patch = __ldg(m.patches + h0.y + lane);
    spread(h1.x - h0.x, codes, lane);
    const uint4* const part = x + column * 2 * m.fragments + t;
    uint4 both;
    decode(m, codes, s.table, lane, reader, [&](int f, int i, const uint32_t(&a)[4], uint32_t, uint32_t) {
      if (i % 2 == 0) both = part[2 * f];
      mma(c, a, i % 2 ? make_uint2(both.z, both.w) : make_uint2(both.x, both.y));  // of its eight columns the first is used
    });
    __syncwarp();
    if (more) fetch(m, h1.x, h2.x - h1.x, codes, lane);
    // Escaped weights. Sixteen of them are the columns of one more fragment, each in its own row. A lane has one of them.
    const uint16_t* const xs = reinterpret_cast<const uint16_t*>(x + column * 2 * m.fragments);
    for (uint32_t from = h0.y; from < h1.y; from += 16) {
      if (from != h0.y) patch = from + lane < h1.y && lane < 16 ? __ldg(m.patches + from + lane) : 0;
      const uint32_t pair = (patch & 0xFFFF) | uint32_t(xs[place(patch >> 16 & 0xFFF)]) << 16;
      uint32_t pairs[4], top[4], bottom[4];
#pragma unroll
      for (int i = 0; i < 4; i++) {
        pairs[i] = __shfl_sync(~0u, pair, 4 * t + i);
        const int row = __shfl_sync(~0u, patch, 4 * t + i) >> 28;
        top[i] = row == g ? pairs[i] : 0;
        bottom[i] = row == g + 8 ? pairs[i] : 0;
      }
      const uint32_t a[4] = {permute(top[0], top[1], 0x5410), permute(bottom[0], bottom[1], 0x5410), permute(top[2], top[3], 0x5410),
                             permute(bottom[2], bottom[3], 0x5410)};
      mma(c, a, make_uint2(permute(pairs[0], pairs[1], 0x7632), permute(pairs[2], pairs[3], 0x7632)));
    }
    const bool ends = ++column == across;
    if (ends || !more) {
      if (t == 0) {
        if (ends && whole) {
          put(row_of_tiles * kTileRows + g, 0, c[0]);
          put(row_of_tiles * kTileRows + g + 8, 0, c[2]);
        } else {
          (*sums)[g] = c[0];
          (*sums)[g + 8] = c[2];
        }
      }
      sums = s.sums[warp] + 1;
      c[0] = c[1] = c[2] = c[3] = 0;
      whole = true;
      row_of_tiles++, column = 0;
    }
    h0 = h1, h1 = h2;
  }
}

__device__ __forceinline__ void product(const Matrix& m, const __nv_bfloat16* x, const __nv_bfloat16* bias, __nv_bfloat16* y) {
  Shared& s = shared();
  const int warp = threadIdx.x / kLanes, lane = threadIdx.x % kLanes, warps = blockDim.x / kLanes;
  uint32_t(*const all_codes)[kLanes] = reinterpret_cast<uint32_t(*)[kLanes]>(&s + 1);
  uint32_t(*const codes)[kLanes] = all_codes + warp * code_rows(m.fragments);
  uint16_t* const xs = reinterpret_cast<uint16_t*>(all_codes + warps * code_rows(m.fragments));  // zeros fill it up to whole tiles
  const int width = m.width(), across = m.across(), down = m.down();
  const int top = int(int64_t(down) * blockIdx.x / gridDim.x), bottom = int(int64_t(down) * (blockIdx.x + 1) / gridDim.x);
  const int begin = top * across, tiles = (bottom - top) * across;
  const int first = run_start(tiles, warp, warps), last = run_start(tiles, warp + 1, warps);
  const auto put = [=, &m](int row, int, float sum) {
    row += top * kTileRows;
    if (row < m.rows) y[row] = __float2bfloat16(bias ? sum + __bfloat162float(bias[row]) : sum);
  };
  uint2 h0 = {}, h1 = {};
  if (first < last) h0 = __ldg(m.tiles + begin + first), h1 = __ldg(m.tiles + begin + first + 1);
  Reader<false> reader(m, begin + first, begin + last, lane);
  load_table(m, s.table);
  if (first < last) fetch(m, h0.x, h1.x - h0.x, codes, lane);
  s.sums[warp][lane / kTileRows][lane % kTileRows] = 0;
  wait_for_the_kernel_before();
  for (int i = 4 * threadIdx.x; i < across * width; i += 4 * blockDim.x)
    copy8(xs + place(i), x + (i < m.columns ? i : 0), min(max(m.columns - i, 0), 4) * 2);
  commit();
  wait();
  bool fine = true;
  for (int i = 4 * threadIdx.x; i < across * width; i += 4 * blockDim.x) {  // what this thread has copied
    const uint2 four = *reinterpret_cast<const uint2*>(xs + place(i));
    fine &= finite(four.x) && finite(four.y);
  }
  if (!__syncthreads_and(fine)) return careful(m, s, codes, x, 1, top, bottom, 0, across, put);
  run(m, s, codes, reinterpret_cast<const uint4*>(xs), begin, first, last, reader, h0, h1, put);
  __syncthreads();
  // Rows of tiles that several warps share: their parts, always in the same order. Eight threads have a row of the matrix.
  for (int i = threadIdx.x; i / 8 < (bottom - top) * kTileRows; i += blockDim.x) {
    const int row = i / 8, from = row / kTileRows * across, to = from + across;
    const int one = ((from + 1) * warps - 1) / tiles, other = (to * warps - 1) / tiles;  // of the first and the last tile
    float sum = 0;
    for (int w = one + i % 8; w <= other; w += 8) sum += s.sums[w][w == one && run_start(tiles, one, warps) < from][row % kTileRows];
#pragma unroll
    for (int d = 4; d; d /= 2) sum += __shfl_xor_sync(0xFFu << (lane & 24), sum, d);
    if (one != other && i % 8 == 0) put(row, 0, sum);
  }
}

// How a product of several rows of x is spread: columns of tiles over `splits` thread blocks, whose sums go to `partial`, float
// [splits, batch, rows]; within a block, `groups` warps share a row of tiles, and `slice` tiles of x are in shared memory at a time.
struct Spread {
  float* partial;
  int32_t batch, splits, groups, slice;
  int32_t parts_at;  // where the sums of a group lie behind x, in bytes; 0: in the place of x
};

// Rows of x in shared memory: for each fragment and each eight rows what a lane takes of the other operand, four columns of row g.
template <int kEights, class Each>
__device__ __forceinline__ void each_four(const Matrix& m, int from, int tiles, Each each) {
  constexpr int kRows = 8 * kEights, kParts = 4;
  const int warp = threadIdx.x / kLanes, lane = threadIdx.x % kLanes, warps = blockDim.x / kLanes;
  const int fours = 4 * m.fragments * tiles / kParts;
  for (int part = warp; part < kRows * kParts; part += warps) {
    const int row = part % kRows, start = part / kRows * fours;
    for (int i = start + lane; i < start + fours; i += kLanes) {
      const int column = from * 16 * m.fragments + 4 * i;
      each(row, column, ((i >> 2) * kEights + row / 8) * kLanes + row % 8 * 4 + (i & 3));
    }
  }
}

// y = x W^T + bias for up to 8 kEights rows of x. A warp has one row of tiles at a time, or with others of its group a part of it; what
// those have found is added in the order of the group.
template <int kEights, bool kDeep>
__device__ __forceinline__ void products(const Matrix& m, const __nv_bfloat16* x, const __nv_bfloat16* bias, __nv_bfloat16* y,
                                         const Spread& how) {
  Shared& s = shared();
  const int warp = threadIdx.x / kLanes, lane = threadIdx.x % kLanes, warps = blockDim.x / kLanes, g = lane / 4, t = lane % 4;
  uint32_t(*const all_codes)[kLanes] = reinterpret_cast<uint32_t(*)[kLanes]>(&s + 1);
  uint32_t(*const codes)[kLanes] = all_codes + warp * code_rows(m.fragments);
  uint2* const xs = reinterpret_cast<uint2*>(all_codes + warps * code_rows(m.fragments));
  float* const parts = reinterpret_cast<float*>(reinterpret_cast<char*>(xs) + how.parts_at);  // [warps][16][8 kEights]
  const int across = m.across(), down = m.down();
  const int split = blockIdx.x % how.splits, block = blockIdx.x / how.splits, blocks = gridDim.x / how.splits;
  const int left = across * split / how.splits, right = across * (split + 1) / how.splits;
  const int top = int(int64_t(down) * block / blocks), bottom = int(int64_t(down) * (block + 1) / blocks);
  const int abreast = warps / how.groups, member = warp / how.groups, group = warp % how.groups;
  const auto put = [=, &m, &how](int row, int n, float sum) {
    row += top * kTileRows;
    if (row >= m.rows || n >= how.batch) return;
    if (how.splits > 1)
      how.partial[(int64_t(split) * how.batch + n) * m.rows + row] = sum;
    else
      y[int64_t(n) * m.rows + row] = __float2bfloat16(bias ? sum + __bfloat162float(bias[row]) : sum);
  };
  load_table(m, s.table);
  bool fine = true, staged = false;
  for (int base = 0; base < bottom - top; base += abreast) {
    const bool active = member < abreast && base + member < bottom - top;
    float c[kEights][4] = {};
    for (int from = left; from < right; from += how.slice) {
      const int width = min(how.slice, right - from);
      const int first = width * group / how.groups, last = active ? width * (group + 1) / how.groups : first;
      const int tile = active ? (top + base + member) * across + from : 0;
      uint2 h0 = {}, h1 = {};
      if (first < last) h0 = __ldg(m.tiles + tile + first), h1 = __ldg(m.tiles + tile + first + 1);
      Reader<kDeep> reader(m, tile + first, tile + last, lane);
      if (first < last) fetch(m, h0.x, h1.x - h0.x, codes, lane);
      if (!staged || how.slice < right - left || (how.groups > 1 && !how.parts_at)) {
        if (staged)
          __syncthreads();  // nobody needs any more what is there
        else
          wait_for_the_kernel_before();
        each_four<kEights>(m, from, width, [&](int row, int column, int at) {
          const int there = row < how.batch ? min(max(m.columns - column, 0), 4) : 0;
          copy8(xs + at, there ? x + int64_t(row) * m.columns + column : x, 2 * there);
        });
        commit();
        wait();
        each_four<kEights>(m, from, width, [&](int, int, int at) { fine &= finite(xs[at].x) && finite(xs[at].y); });
        __syncthreads();
        staged = true;
      }
      for (int column = first; column < last; column++) {
        const bool more = column + 1 < last;
        uint2 h2 = h1;
        if (more) h2 = __ldg(m.tiles + tile + column + 2);
        uint32_t patch = 0;
        if (h0.y + lane < h1.y && lane < 16) patch = __ldg(m.patches + h0.y + lane);
        spread(h1.x - h0.x, codes, lane);
        const uint2* const part = xs + column * m.fragments * kEights * kLanes;
        decode(m, codes, s.table, lane, reader, [&](int f, int, const uint32_t(&a)[4], uint32_t, uint32_t) {
#pragma unroll
          for (int j = 0; j < kEights; j++) mma(c[j], a, part[(f * kEights + j) * kLanes + lane]);
        });
        __syncwarp();
        if (more) fetch(m, h1.x, h2.x - h1.x, codes, lane);
        for (uint32_t at = h0.y; at < h1.y; at += 16) {
          if (at != h0.y) patch = at + lane < h1.y && lane < 16 ? __ldg(m.patches + at + lane) : 0;
          uint32_t of[4], upper[4], lower[4];
#pragma unroll
          for (int i = 0; i < 4; i++) {
            of[i] = __shfl_sync(~0u, patch, 4 * t + i);
            upper[i] = int(of[i] >> 28) == g ? of[i] : 0;
            lower[i] = int(of[i] >> 28) == g + 8 ? of[i] : 0;
          }
          const uint32_t a[4] = {permute(upper[0], upper[1], 0x5410), permute(lower[0], lower[1], 0x5410),
                                 permute(upper[2], upper[3], 0x5410), permute(lower[2], lower[3], 0x5410)};
#pragma unroll
          for (int j = 0; j < kEights; j++) {
            uint32_t b[4];
#pragma unroll
            for (int i = 0; i < 4; i++) {
              const uint32_t k = of[i] >> 16 & 0xFFF;
              b[i] = reinterpret_cast<const uint16_t*>(part + ((k >> 4) * kEights + j) * kLanes + 4 * g + (k >> 2 & 3))[k & 3];
            }
            mma(c[j], a, make_uint2(permute(b[0], b[1], 0x5410), permute(b[2], b[3], 0x5410)));
          }
        }
        h0 = h1, h1 = h2;
      }
    }
    if (how.groups == 1) {
      if (active) {
#pragma unroll
        for (int j = 0; j < kEights; j++)
#pragma unroll
          for (int i = 0; i < 4; i++) put((base + member) * kTileRows + g + 8 * (i / 2), 8 * j + 2 * t + i % 2, c[j][i]);
      }
      continue;
    }
    __syncthreads();
    constexpr int kColumns = 8 * kEights;
#pragma unroll
    for (int j = 0; j < kEights; j++)
#pragma unroll
      for (int i = 0; i < 4; i++) parts[(warp * kTileRows + g + 8 * (i / 2)) * kColumns + 8 * j + 2 * t + i % 2] = c[j][i];
    __syncthreads();
    const int count = min(abreast, bottom - top - base) * kTileRows * kColumns;
    for (int i = threadIdx.x; i < count; i += blockDim.x) {
      const int row = i % kTileRows, n = i / kTileRows % kColumns, of = i / kTileRows / kColumns;
      float sum = 0;
      for (int k = 0; k < how.groups; k++) sum += parts[((of * how.groups + k) * kTileRows + row) * kColumns + n];
      put((base + of) * kTileRows + row, n, sum);
    }
  }
  if (__syncthreads_or(!fine)) careful(m, s, codes, x, how.batch, top, bottom, left, right, put);
}

constexpr int kMostSplits = 8;

// y[first:] = the sums of all splits, in their order, + bias. partial: [splits, batch, rows - first].
__device__ __forceinline__ void add_up(const float* partial, const __nv_bfloat16* bias, __nv_bfloat16* y, int rows, int batch, int splits,
                                       int first) {
  const int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x, some = rows - first, count = some * batch;
  wait_for_the_kernel_before();
  if (i >= count) return;
  float parts[kMostSplits], sum = 0;
#pragma unroll
  for (int k = 0; k < kMostSplits; k++) parts[k] = k < splits ? __ldcs(partial + k * count + i) : 0;
#pragma unroll
  for (int k = 0; k < kMostSplits; k++) sum += parts[k];
  const int64_t row = first + i % some;
  y[i / some * rows + row] = __float2bfloat16(bias ? sum + __bfloat162float(bias[row]) : sum);
}

__device__ __forceinline__ void decompress(const Matrix& m, uint16_t* out) {
  Shared& s = shared();
  const int warp = threadIdx.x / kLanes, lane = threadIdx.x % kLanes, g = lane / 4, t = lane % 4, warps = blockDim.x / kLanes;
  uint32_t(*const codes)[kLanes] = reinterpret_cast<uint32_t(*)[kLanes]>(&s + 1) + warp * code_rows(m.fragments);
  const int width = m.width(), across = m.across(), down = m.down();
  const int all = down * across, runs = gridDim.x * warps;
  const int first = run_start(all, blockIdx.x * warps + warp, runs), last = run_start(all, blockIdx.x * warps + warp + 1, runs);
  uint2 h0 = {}, h1 = {};
  if (first < last) h0 = __ldg(m.tiles + first), h1 = __ldg(m.tiles + first + 1);
  Reader<false> reader(m, first, last, lane);
  load_table(m, s.table);
  if (first < last) fetch(m, h0.x, h1.x - h0.x, codes, lane);
  wait();
  wait_for_the_kernel_before();
  __syncthreads();
  const bool aligned = m.columns % 8 == 0 && reinterpret_cast<uintptr_t>(out) % 16 == 0;
  for (int tile = first; tile < last; tile++) {
    const bool more = tile + 1 < last;
    uint2 h2 = h1;
    if (more) h2 = __ldg(m.tiles + tile + 2);
    spread(h1.x - h0.x, codes, lane);
    const int row = tile / across * kTileRows, left = tile % across * width;
    uint16_t* const upper = out + int64_t(row + g) * m.columns + left + 4 * t;
    uint16_t* const lower = upper + int64_t(8) * m.columns;
    const bool inside = row + kTileRows <= m.rows && left + width <= m.columns && aligned;
    uint32_t kept[4];  // of the fragment before, of a pair
    decode(m, codes, s.table, lane, reader, [&](int f, int i, const uint32_t(&a)[4], uint32_t, uint32_t) {
      if (inside) {
        // Two lanes side by side exchange halves, so that each has 16 bytes in a row of one fragment of the pair.
        if (i % 2 == 0) {
#pragma unroll
          for (int k = 0; k < 4; k++) kept[k] = a[k];
          return;
        }
        uint32_t own[4], other[4];
#pragma unroll
        for (int k = 0; k < 4; k++) {
          own[k] = t % 2 ? a[k] : kept[k];
          other[k] = __shfl_xor_sync(~0u, t % 2 ? kept[k] : a[k], 1);
        }
        const int column = 16 * (f - 1 + t % 2) - 4 * (t % 2);
#pragma unroll
        for (int half = 0; half < 2; half++) {
          const uint4 both = t % 2 ? make_uint4(other[half], other[half + 2], own[half], own[half + 2])
                                   : make_uint4(own[half], own[half + 2], other[half], other[half + 2]);
          *reinterpret_cast<uint4*>((half ? lower : upper) + column) = both;
        }
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
    if (more) fetch(m, h1.x, h2.x - h1.x, codes, lane);
    for (uint32_t k = h0.y + lane; k < h1.y; k += kLanes) {
      const uint32_t patch = __ldg(m.patches + k);
      out[int64_t(row + (patch >> 28)) * m.columns + left + (patch >> 16 & 0xFFF)] = uint16_t(patch);
    }
    h0 = h1, h1 = h2;
  }
}

// Some rows: out[i] = W[rows[i]]. A thread block has one row, its warps take turns with the tiles of its row of tiles.
__device__ __forceinline__ void gather(const Matrix& m, const int64_t* rows, uint16_t* out) {
  Shared& s = shared();
  const int warp = threadIdx.x / kLanes, lane = threadIdx.x % kLanes, g = lane / 4, t = lane % 4, warps = blockDim.x / kLanes;
  uint32_t(*const codes)[kLanes] = reinterpret_cast<uint32_t(*)[kLanes]>(&s + 1) + warp * code_rows(m.fragments);
  const int width = m.width(), across = m.across();
  load_table(m, s.table);
  wait();
  wait_for_the_kernel_before();
  __syncthreads();
  const int64_t row = rows[blockIdx.x];
  if (row < 0 || row >= m.rows) __trap();
  const int within = int(row % kTileRows);
  uint16_t* const to = out + int64_t(blockIdx.x) * m.columns;
  for (int column = warp; column < across; column += warps) {
    const int tile = int(row / kTileRows) * across + column, left = column * width;
    const uint2 h0 = __ldg(m.tiles + tile), h1 = __ldg(m.tiles + tile + 1);
    Reader<false> reader(m, tile, tile + 1, lane);
    fetch(m, h0.x, h1.x - h0.x, codes, lane);
    spread(h1.x - h0.x, codes, lane);
    decode(m, codes, s.table, lane, reader, [&](int f, int, const uint32_t(&a)[4], uint32_t, uint32_t) {
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const int at = left + 16 * f + 4 * t + i;
        const uint32_t two = within < 8 ? a[i / 2 * 2] : a[i / 2 * 2 + 1];
        if (g == within % 8 && at < m.columns) to[at] = uint16_t(two >> 16 * (i & 1));
      }
    });
    __syncwarp();
    for (uint32_t k = h0.y + lane; k < h1.y; k += kLanes) {
      const uint32_t patch = __ldg(m.patches + k);
      if (int(patch >> 28) == within) to[left + (patch >> 16 & 0xFFF)] = uint16_t(patch);
    }
    __syncwarp();
  }
}

}  // namespace tiled

// Launch with 32 threads for each of up to kMostWarps warps, or kProductWarps; decompression with a thread block for each
// multiprocessor, the product with one or two.
// Dynamic shared memory: kPadding, sizeof(Shared), 128 code_rows(F) for each warp, and for the product x in whole tiles.
extern "C" __constant__ const int tiled_shared = tiled::kPadding + int(sizeof(tiled::Shared));

extern "C" __global__ void __launch_bounds__(tiled::kProductWarps* tiled::kLanes, 1)
tiled_product(const __grid_constant__ tiled::Matrix m, const __nv_bfloat16* x, const __nv_bfloat16* bias, __nv_bfloat16* y) {
  tiled::product(m, x, bias, y);
}

#define TILED_PRODUCTS(rows, warps, deep)                                                                                     \
  extern "C" __global__ void __launch_bounds__(warps* tiled::kLanes, 1)                                                       \
  tiled_products_##rows(const __grid_constant__ tiled::Matrix m, const __nv_bfloat16* x, const __nv_bfloat16* bias,            \
                        __nv_bfloat16* y, const __grid_constant__ tiled::Spread how) {                                        \
    tiled::products<rows / 8, deep>(m, x, bias, y, how);                                                                      \
  }
TILED_PRODUCTS(8, 28, false)
TILED_PRODUCTS(16, 24, false)
TILED_PRODUCTS(32, 16, true)
TILED_PRODUCTS(64, 16, false)

extern "C" __global__ void tiled_add_up(const float* partial, const __nv_bfloat16* bias, __nv_bfloat16* y, const __grid_constant__ int4 how) {
  tiled::add_up(partial, bias, y, how.x, how.y, how.z, how.w);  // rows, batch, splits, first row
}

extern "C" __global__ void __launch_bounds__(tiled::kMostWarps* tiled::kLanes, 1)
tiled_decompress(const __grid_constant__ tiled::Matrix m, uint16_t* out) {
  tiled::decompress(m, out);
}

extern "C" __global__ void __launch_bounds__(tiled::kMostWarps* tiled::kLanes, 1)
tiled_rows(const __grid_constant__ tiled::Matrix m, const int64_t* rows, uint16_t* out) {
  tiled::gather(m, rows, out);
}
