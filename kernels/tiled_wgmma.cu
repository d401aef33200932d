// The tiled layout on compute capability 9.0: y = x W^T + bias for 9 to 128 rows of x by wgmma, weights from registers.
//
//   nvcc -O3 -std=c++17 -arch=sm_90a -cubin -o tiled_wgmma.cubin tiled_wgmma.cu
//
// Four warps, a warpgroup, have four rows of tiles: the 64 rows of a wgmma. Each decodes its own as for mma.sync, four fragments at a
// time, while those before are multiplied. x, which a kernel before this one has packed, is read from shared memory once for all four;
// bulk copies bring it there, through a ring that all warps of a block go around together. Codes come by bulk copies too, up to
// 64 rows those of the next tile while this one is decoded; low bytes through a ring of each warp. Sums of several thread blocks are
// added by tiled_add_up.
#include "tiled.cuh"

namespace tiled {

constexpr int kGroup = 4;       // warps
// By rows of x. Sums of 128 take 64 registers, so there are fewer warps; they were faster with the codes of one tile each.
template <int kRows>
constexpr int kWideWarps = kRows > 64 ? 12 : 16;  // at most
template <int kRows>
constexpr int kSlots = kRows > 32 ? 4 : 8;  // of x, four fragments each
template <int kRows>
constexpr int kChunks = kRows > 64 ? 4 : 3;  // of a warp's low bytes and signs, four fragments each
template <int kRows>
constexpr int kBuffers = kRows > 64 ? 1 : 2;  // of a warp's codes
constexpr int kMostSlots = 8, kMostWideWarps = 16;
constexpr int kLow = 2 * kLanes * 16, kSigns = kLanes * 4;  // bytes of four fragments

struct Wide {
  const uint4* packed;     // x by tiled_pack
  const uint16_t* turned;  // the same in columns
  // float [splits, batch, rows] where splits > 1; [pieces, batch, rows of what is left] where there are several pieces.
  float* partial;
  int32_t batch, splits;
  // Where each thread block has all columns: so many fours of rows of tiles are its own, and each four that is left is dealt, by
  // columns, to so many thread blocks. 0: fours are divided as they come.
  int32_t whole, pieces;
};

struct Barriers {  // mbarriers, in the place of Shared::sums
  uint64_t full[kMostSlots], empty[kMostSlots], codes[kMostWideWarps];
};
static_assert(sizeof(Barriers) <= sizeof(Shared::sums));

__device__ __forceinline__ void init(uint32_t barrier, int count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(count) : "memory");
}
__device__ __forceinline__ void arrive(uint32_t barrier) { asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory"); }
__device__ __forceinline__ void copy(uint32_t barrier, uint32_t to, const void* from, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to), "l"(from), "r"(bytes),
               "r"(barrier)
               : "memory");
}
__device__ __forceinline__ void copy4(uint32_t to, const void* from) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(to), "l"(from) : "memory");
}
template <int kPending>
__device__ __forceinline__ void wait_but() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}
__device__ __forceinline__ uint4 load_four(uint32_t at) {
  uint4 out;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(out.x), "=r"(out.y), "=r"(out.z), "=r"(out.w) : "r"(at));
  return out;
}
__device__ __forceinline__ void prefetch(const void* from, uint32_t bytes) {
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(from), "r"(bytes) : "memory");
}
__device__ __forceinline__ void wait(uint32_t barrier, uint32_t parity) {
  asm volatile(
      "{\n.reg .pred arrived;\n"
      "again: mbarrier.try_wait.parity.shared::cta.b64 arrived, [%0], %1;\n"
      "@!arrived bra again;\n}" ::"r"(barrier),
      "r"(parity)
      : "memory");
}
__device__ __forceinline__ void hide(uint32_t& value) { asm volatile("" : "+r"(value)); }  // kept in a register, not computed again

// The other operand: K-major, no swizzle; 8 rows x 16 bytes are 128 bytes in one piece, the second half of k behind the first, the
// next eight rows 256 bytes on.
__device__ __forceinline__ uint32_t descriptor(uint32_t at) { return (at >> 4 & 0x3FFF) | 128 >> 4 << 16; }
__device__ __forceinline__ uint64_t descriptor_at(uint32_t low) {
  uint64_t out;
  asm("mov.b64 %0, {%1, %2};" : "=l"(out) : "r"(low), "r"(256 >> 4));
  return out;
}

template <int kEights>
__device__ __forceinline__ void wgmma(float (&c)[kEights][4], const uint32_t (&a)[4], uint64_t b);

template <>
__device__ __forceinline__ void wgmma<8>(float (&c)[8][4], const uint32_t (&a)[4], uint64_t b) {
  asm volatile(
      "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, "
      "%17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, {%32, %33, %34, %35}, %36, 1, 1, 1, 0;"
      : "+f"(c[0][0]), "+f"(c[0][1]), "+f"(c[0][2]), "+f"(c[0][3]), "+f"(c[1][0]), "+f"(c[1][1]), "+f"(c[1][2]), "+f"(c[1][3]),
        "+f"(c[2][0]), "+f"(c[2][1]), "+f"(c[2][2]), "+f"(c[2][3]), "+f"(c[3][0]), "+f"(c[3][1]), "+f"(c[3][2]), "+f"(c[3][3]),
        "+f"(c[4][0]), "+f"(c[4][1]), "+f"(c[4][2]), "+f"(c[4][3]), "+f"(c[5][0]), "+f"(c[5][1]), "+f"(c[5][2]), "+f"(c[5][3]),
        "+f"(c[6][0]), "+f"(c[6][1]), "+f"(c[6][2]), "+f"(c[6][3]), "+f"(c[7][0]), "+f"(c[7][1]), "+f"(c[7][2]), "+f"(c[7][3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}
template <>
__device__ __forceinline__ void wgmma<2>(float (&c)[2][4], const uint32_t (&a)[4], uint64_t b) {
  asm volatile(
      "wgmma.mma_async.sync.aligned.m64n16k16.f32.bf16.bf16 {%0, %1, %2, %3, %4, %5, %6, %7}, {%8, %9, %10, %11}, %12, 1, 1, 1, 0;"
      : "+f"(c[0][0]), "+f"(c[0][1]), "+f"(c[0][2]), "+f"(c[0][3]), "+f"(c[1][0]), "+f"(c[1][1]), "+f"(c[1][2]), "+f"(c[1][3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}
template <>
__device__ __forceinline__ void wgmma<4>(float (&c)[4][4], const uint32_t (&a)[4], uint64_t b) {
  asm volatile(
      "wgmma.mma_async.sync.aligned.m64n32k16.f32.bf16.bf16 {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15}, "
      "{%16, %17, %18, %19}, %20, 1, 1, 1, 0;"
      : "+f"(c[0][0]), "+f"(c[0][1]), "+f"(c[0][2]), "+f"(c[0][3]), "+f"(c[1][0]), "+f"(c[1][1]), "+f"(c[1][2]), "+f"(c[1][3]),
        "+f"(c[2][0]), "+f"(c[2][1]), "+f"(c[2][2]), "+f"(c[2][3]), "+f"(c[3][0]), "+f"(c[3][1]), "+f"(c[3][2]), "+f"(c[3][3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}
template <>
__device__ __forceinline__ void wgmma<16>(float (&c)[16][4], const uint32_t (&a)[4], uint64_t b) {
  asm volatile(
      "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, "
      "%17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, "
      "%43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "
      "{%64, %65, %66, %67}, %68, 1, 1, 1, 0;"
      : "+f"(c[0][0]), "+f"(c[0][1]), "+f"(c[0][2]), "+f"(c[0][3]), "+f"(c[1][0]), "+f"(c[1][1]), "+f"(c[1][2]), "+f"(c[1][3]),
        "+f"(c[2][0]), "+f"(c[2][1]), "+f"(c[2][2]), "+f"(c[2][3]), "+f"(c[3][0]), "+f"(c[3][1]), "+f"(c[3][2]), "+f"(c[3][3]),
        "+f"(c[4][0]), "+f"(c[4][1]), "+f"(c[4][2]), "+f"(c[4][3]), "+f"(c[5][0]), "+f"(c[5][1]), "+f"(c[5][2]), "+f"(c[5][3]),
        "+f"(c[6][0]), "+f"(c[6][1]), "+f"(c[6][2]), "+f"(c[6][3]), "+f"(c[7][0]), "+f"(c[7][1]), "+f"(c[7][2]), "+f"(c[7][3]),
        "+f"(c[8][0]), "+f"(c[8][1]), "+f"(c[8][2]), "+f"(c[8][3]), "+f"(c[9][0]), "+f"(c[9][1]), "+f"(c[9][2]), "+f"(c[9][3]),
        "+f"(c[10][0]), "+f"(c[10][1]), "+f"(c[10][2]), "+f"(c[10][3]), "+f"(c[11][0]), "+f"(c[11][1]), "+f"(c[11][2]), "+f"(c[11][3]),
        "+f"(c[12][0]), "+f"(c[12][1]), "+f"(c[12][2]), "+f"(c[12][3]), "+f"(c[13][0]), "+f"(c[13][1]), "+f"(c[13][2]), "+f"(c[13][3]),
        "+f"(c[14][0]), "+f"(c[14][1]), "+f"(c[14][2]), "+f"(c[14][3]), "+f"(c[15][0]), "+f"(c[15][1]), "+f"(c[15][2]), "+f"(c[15][3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}
__device__ __forceinline__ void fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void commit_group() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int kLeft>
__device__ __forceinline__ void wait_group() { asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kLeft) : "memory"); }

// x as the other operand of all fragments, [across F][kEights][2][8] uint4: of sixteen columns the first and second of each four, then
// the third and fourth, which is the order in which lanes have weights. And in columns, [across 16 F][8][kEights]. Zero beyond columns
// and rows of x.
template <int kEights>
__device__ __forceinline__ void pack(const __nv_bfloat16* x, uint4* packed, uint16_t* turned, int batch, int columns, int fragments) {
  constexpr int kRows = 8 * kEights;
  const int i = blockIdx.x * blockDim.x + threadIdx.x, n = i % kRows, f = i / kRows;
  wait_for_the_kernel_before();
  if (f >= fragments) return;
  uint2 fours[4];
#pragma unroll
  for (int k = 0; k < 4; k++) {
    const int column = 16 * f + 4 * k;
    fours[k] = n < batch && column < columns ? *reinterpret_cast<const uint2*>(x + int64_t(n) * columns + column) : make_uint2(0, 0);
  }
  uint4* const to = packed + (int64_t(f) * kEights + n / 8) * 16 + n % 8;
  to[0] = make_uint4(fours[0].x, fours[1].x, fours[2].x, fours[3].x);
  to[8] = make_uint4(fours[0].y, fours[1].y, fours[2].y, fours[3].y);
  uint16_t* const column = turned + int64_t(16 * f) * kRows + n % 8 * kEights + n / 8;
#pragma unroll
  for (int k = 0; k < 16; k++) column[k * kRows] = uint16_t((k & 2 ? fours[k / 4].y : fours[k / 4].x) >> 16 * (k & 1));
}

// y = x W^T + bias for up to 8 kEights rows of x. A thread block has some columns of tiles (of `splits` parts) of some fours of rows of
// tiles, one for each warpgroup at a time, in rounds; x is gone through in each. A piece of a four comes last.
template <int kEights>
__device__ __forceinline__ void wide(const Matrix& m, const __nv_bfloat16* x, const __nv_bfloat16* bias, __nv_bfloat16* y, const Wide& how) {
  constexpr int kRows = 8 * kEights, kSlot = 4 * kRows * 32;  // bytes of x of four fragments
  constexpr int kRing = kSlots<kRows>, kAhead = kRing - 2;  // slots, and how many ahead they are filled
  constexpr int kDepth = kChunks<kRows>, kHeld = kBuffers<kRows>;
  Shared& s = shared();
  const int warp = threadIdx.x / kLanes, lane = threadIdx.x % kLanes, warps = blockDim.x / kLanes, g = lane / 4, t = lane % 4;
  uint32_t(*const all_codes)[kLanes] = reinterpret_cast<uint32_t(*)[kLanes]>(&s + 1);
  uint32_t(*const codes)[kLanes] = all_codes + warp * kHeld * code_rows(m.fragments);
  const uint32_t xs = address(all_codes + warps * kHeld * code_rows(m.fragments));  // [kRing][4][kEights][2][8] uint4
  const uint32_t barriers = address(s.sums);
  const int across = m.across(), quads = (m.down() + kGroup - 1) / kGroup, fours = m.fragments / 4;
  const int abreast = warps / kGroup, member = warp / kGroup;
  const int split = blockIdx.x % how.splits, block = blockIdx.x / how.splits, blocks = gridDim.x / how.splits;
  const int left = across * split / how.splits, right = across * (split + 1) / how.splits;
  const int top = how.whole ? how.whole * block : int(int64_t(quads) * block / blocks);
  const int own = how.whole ? how.whole : int(int64_t(quads) * (block + 1) / blocks) - top;
  const int rest = how.whole * blocks, dealt = rest + block / max(how.pieces, 1), piece = block % max(how.pieces, 1);
  const int items = own + (how.whole && dealt < quads);
  const int piece_left = across * piece / max(how.pieces, 1), piece_right = across * (piece + 1) / max(how.pieces, 1);
  // Slots of x that are gone through: in a round all, in one of a piece alone its own.
  const bool alone = items > own && own % abreast == 0;
  const uint32_t each = (right - left) * fours, regular = ((alone ? own : items) + abreast - 1) / abreast * each;
  const uint32_t all = regular + alone * (piece_right - piece_left) * fours;
  const uint32_t full = barriers + offsetof(Barriers, full), empty = barriers + offsetof(Barriers, empty);
  uint32_t arrived = barriers + offsetof(Barriers, codes) + 8 * warp;  // the codes of a tile
  // A row of tiles beyond the last is the last once more, and not kept.
  const auto row_of = [&](int item) { return kGroup * (item < own ? top + item : dealt) + warp % kGroup; };
  const auto first_tile = [&](int item) { return min(row_of(item), m.down() - 1) * across + (item < own ? left : piece_left); };
  const auto bring = [&](uint32_t slice, uint32_t at) {  // slice: of a round
    const uint32_t slot = at % kRing;
    if (at >= regular) slice = (piece_left - left) * fours + at - regular;
    copy(full + 8 * slot, xs + slot * kSlot, reinterpret_cast<const char*>(how.packed) + (int64_t(left) * fours + slice) * kSlot, kSlot);
  };
  // Low bytes and signs are brought some fours ahead, each lane's by itself.
  uint32_t low = xs + kRing * kSlot + warp * kDepth * kLow + 16 * lane;
  uint32_t signs = xs + kRing * kSlot + warps * kDepth * kLow + warp * kDepth * kSigns + 4 * lane;
  uint32_t entries = address(s.table), lane_at = 4 * lane, own_codes = address(codes);
  hide(low), hide(signs), hide(entries), hide(lane_at), hide(own_codes), hide(arrived);
  int low_item = member - abreast;
  uint32_t low_left = 0, chunk = 0;
  const uint8_t* low_from = nullptr;
  const uint32_t* signs_from = nullptr;
  const auto refill = [&] {
    if (low_left == 0) {
      low_item += abreast;
      if (low_item < items) {
        const int tile = first_tile(low_item);
        low_from = m.low + int64_t(tile) * m.fragments * 256 + 16 * lane;
        signs_from = m.sign + int64_t(tile) * m.fragments * 8 + lane;
        low_left = low_item < own ? each : (piece_right - piece_left) * fours;
      }
    }
    if (low_left > 0) {
      copy16(low + chunk * kLow, low_from);
      copy16(low + chunk * kLow + kLow / 2, low_from + kLow / 2);
      copy4(signs + chunk * kSigns, signs_from);
      low_from += kLow, signs_from += kLanes, low_left--;
    }
    commit();
    chunk = (chunk + 1) % kDepth;
  };
  const auto buffer_of = [&](uint32_t nth) { return kHeld > 1 && nth & 1 ? code_rows(m.fragments) : 0; };  // in rows
  uint32_t fetched = 0;
  const auto fetch_codes = [&](uint32_t first, uint32_t last) {
    if (lane == 0) copy(arrived, own_codes + buffer_of(fetched) * kLanes * 4, m.stream + int64_t(first) * kLanes, (last - first) * kLanes);
    fetched++;
  };
  uint2 h0 = {}, h1 = {};
  if (member < items) h0 = __ldg(m.tiles + first_tile(member)), h1 = __ldg(m.tiles + first_tile(member) + 1);
  if (lane == 0) init(arrived, 1);
  if (threadIdx.x < kRing) init(full + 8 * threadIdx.x, 1), init(empty + 8 * threadIdx.x, warps);
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  __syncthreads();
  load_table(m, s.table);
  commit();
  for (int i = 0; i < kDepth; i++) refill();
  if (member < items) fetch_codes(h0.x, h1.x);
  wait_but<kDepth>();
  __syncthreads();
  wait_for_the_kernel_before();
  if (threadIdx.x == 0)
    for (uint32_t i = 0; i < min(kAhead, all); i++) bring(i % each, i);
  // Where sums go of which others have parts: those of a split, or of a piece.
  struct Part {
    float* sums;
    int64_t rows;
    int first;
  };
  const auto part_of = [&](bool of_piece) {
    const int first = of_piece ? rest * kGroup * kTileRows : 0;
    const int64_t rows = m.rows - first;
    return Part{how.partial + (of_piece ? piece : split) * how.batch * rows, rows, first};
  };
  bool fine = true;
  uint32_t n = 0, tiles_done = 0;  // n: slots of x that this warp has gone through
  uint32_t duty = warp, slice = (warp + kAhead) % each;  // slots until it is this warp's turn to bring one, and which that will be
  const auto release = [&] {
    if (lane == 0 && n > 0) arrive(empty + 8 * ((n - 1) % kRing));
    if (duty-- == 0) {
      duty = warps - 1;
      const uint32_t at = n + kAhead;
      if (lane == 0 && at < all) {
        if (at >= kRing) wait(empty + 8 * (at % kRing), (at / kRing - 1) & 1);
        bring(slice, at);
      }
      slice += warps;
      while (slice >= each) slice -= each;
      __syncwarp();
    }
  };
  const auto pass = [&](int columns) {
    for (const uint32_t until = n + columns * fours; n < until; n++) {
      release();
      wait(full + 8 * (n % kRing), n / kRing & 1);
      __syncwarp();  // or a lane behind might find the slot in a later phase
    }
  };
  for (int item = member; item - member < items; item += abreast) {
    const int before = alone && item - member >= own ? piece_left : left, after = alone && item - member >= own ? piece_right : right;
    if (item >= items) {
      pass(after - before);
      break;
    }
    float c[kEights][4] = {};
    const int tile = first_tile(item);
    const int begin = item < own ? left : piece_left, end = item < own ? right : piece_right;
    pass(begin - before);
    if (item >= abreast) {
      h0 = __ldg(m.tiles + tile), h1 = __ldg(m.tiles + tile + 1);
      fetch_codes(h0.x, h1.x);
    }
    uint2 h2 = kHeld > 1 && begin + 1 < end ? __ldg(m.tiles + tile + 2) : h1;
    for (int column = begin; column < end; column++) {
      const bool more = column + 1 < end;
      if (kHeld == 1 && more) h2 = __ldg(m.tiles + tile + (column - begin) + 2);
      const uint2 h3 = kHeld > 1 && column + 2 < end ? __ldg(m.tiles + tile + (column - begin) + 3) : h2;
      uint32_t patch = 0;
      if (h0.y + lane < h1.y && lane < 16) patch = __ldg(m.patches + h0.y + lane);
      const int buffer = buffer_of(tiles_done);
      wait(arrived, tiles_done++ & 1);
      __syncwarp();  // the barrier has a phase to begin when all have seen the last
      if (kHeld > 1 && more) fetch_codes(h1.x, h2.x);
      spread_rest(h1.x - h0.x, codes + buffer, lane);
      if (kHeld == 1 && more && lane == 0) prefetch(m.stream + int64_t(h1.x) * kLanes, (h2.x - h1.x) * kLanes);
      uint32_t position = own_codes + buffer * kLanes * 4 - 4 * kLanes + 4 * 30;
#pragma unroll 1
      for (int four = 0; four < fours; four++, n++) {
        wait_but<kDepth - 1>();
        const uint4 both[2] = {load_four(low + chunk * kLow), load_four(low + chunk * kLow + kLow / 2)};
        const uint32_t sign = load_shared(signs + chunk * kSigns);
        uint32_t found[4][2];
#pragma unroll
        for (int f = 0; f < 4; f++) look_up(position, lane_at, entries, found[f][0], found[f][1]);
        wait_group<0>();
        release();
        uint32_t a[4][4];
#pragma unroll
        for (int f = 0; f < 4; f++) assemble(m, f, found[f][0], found[f][1], both[f / 2], sign, a[f]);
        refill();
        wait(full + 8 * (n % kRing), n / kRing & 1);
        const uint32_t b = descriptor(xs) + n % kRing * (kSlot >> 4);
        fence();
#pragma unroll
        for (int f = 0; f < 4; f++) wgmma<kEights>(c, a[f], descriptor_at(b + f * kRows * 2));
        commit_group();
      }
      __syncwarp();
      asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
      if (kHeld == 1 && more) fetch_codes(h1.x, h2.x);
      wait_group<0>();  // not among the escapes: all four warps must come to it alike
      for (uint32_t k = h0.y; k < h1.y; k += 16) {
        if (k != h0.y) patch = k + lane < h1.y && lane < 16 ? __ldg(m.patches + k + lane) : 0;
        uint32_t of[4], upper[4], lower[4];
#pragma unroll
        for (int i = 0; i < 4; i++) {
          of[i] = __shfl_sync(~0u, patch, 4 * t + i);
          upper[i] = int(of[i] >> 28) == g ? of[i] : 0;
          lower[i] = int(of[i] >> 28) == g + 8 ? of[i] : 0;
        }
        const uint32_t a[4] = {permute(upper[0], upper[1], 0x5410), permute(lower[0], lower[1], 0x5410),
                               permute(upper[2], upper[3], 0x5410), permute(lower[2], lower[3], 0x5410)};
        constexpr int kPart = kEights < 8 ? kEights : 8;  // eights of rows of x at a time
#pragma unroll
        for (int first = 0; first < kEights; first += kPart) {
          uint32_t rows[4][kPart / 2];
#pragma unroll
          for (int i = 0; i < 4; i++) {
            // Not by __ldg: tiled_pack may have written it while this kernel ran already.
            const uint16_t* const row = how.turned + (int64_t(column) * m.width() + (of[i] >> 16 & 0xFFF)) * kRows + g * kEights + first;
            if constexpr (kPart == 8) {
              const uint4 all = *reinterpret_cast<const uint4*>(row);
              rows[i][0] = all.x, rows[i][1] = all.y, rows[i][2] = all.z, rows[i][3] = all.w;
            } else if constexpr (kPart == 4) {
              const uint2 all = *reinterpret_cast<const uint2*>(row);
              rows[i][0] = all.x, rows[i][1] = all.y;
            } else {
              rows[i][0] = *reinterpret_cast<const uint32_t*>(row);
            }
          }
#pragma unroll
          for (int j = 0; j < kPart; j++) {
            constexpr uint32_t kHalves[] = {0x5410, 0x7632};
            mma(c[first + j], a,
                make_uint2(permute(rows[0][j / 2], rows[1][j / 2], kHalves[j % 2]), permute(rows[2][j / 2], rows[3][j / 2], kHalves[j % 2])));
          }
        }
      }
      h0 = h1, h1 = h2, h2 = h3;
    }
    pass(after - end);
    if (row_of(item) < m.down()) {
#pragma unroll
      for (int half = 0; half < 2; half++) {
        const int row = row_of(item) * kTileRows + g + 8 * half;
        if (row >= m.rows) break;
        const auto keep = [&](auto* to, int64_t stride, auto convert) {
          to += 2 * t * stride + row;
#pragma unroll
          for (int j = 0; j < kEights; j++, to += 8 * stride) {
            if (8 * j + 2 * t < how.batch) to[0] = convert(c[j][2 * half]), fine &= isfinite(c[j][2 * half]);
            if (8 * j + 2 * t + 1 < how.batch) to[stride] = convert(c[j][2 * half + 1]), fine &= isfinite(c[j][2 * half + 1]);
          }
        };
        if (how.splits > 1 || (item >= own && how.pieces > 1)) {
          const Part part = part_of(item >= own);
          keep(part.sums - part.first, part.rows, [](float sum) { return sum; });
        } else {
          const float more = bias ? __bfloat162float(bias[row]) : 0;
          keep(y, m.rows, [&](float sum) { return __float2bfloat16(bias ? sum + more : sum); });
        }
      }
    }
  }
  if (!__syncthreads_or(!fine)) return;
  const auto again = [&](bool dealt_one, int first, int last, int begin, int end) {
    const bool parts = how.splits > 1 || (dealt_one && how.pieces > 1);
    const Part part = part_of(dealt_one);
    careful(m, s, codes, x, how.batch, kGroup * first, min(kGroup * last, m.down()), begin, end, [=, &m, &how](int row, int k, float sum) {
      row += first * kGroup * kTileRows;
      if (row >= m.rows || k >= how.batch) return;
      if (parts)
        part.sums[int64_t(k) * part.rows + row - part.first] = sum;
      else
        y[int64_t(k) * m.rows + row] = __float2bfloat16(bias ? sum + __bfloat162float(bias[row]) : sum);
    });
  };
  again(false, top, top + own, left, right);
  if (items > own) again(true, dealt, dealt + 1, piece_left, piece_right);
}

}  // namespace tiled

// Launch with 128 threads for each of up to kWideWarps / 4 warpgroups. Dynamic shared memory: tiled_shared of tiled.cu, 128 kBuffers
// code_rows(F) for each warp, kSlots times 128 rows, and for each warp kChunks (kLow + kSigns).
#define TILED_WIDE(rows)                                                                                                       \
  extern "C" __global__ void __launch_bounds__(tiled::kWideWarps<rows> * tiled::kLanes, 1)                                     \
  tiled_wide_##rows(const __grid_constant__ tiled::Matrix m, const __nv_bfloat16* x, const __nv_bfloat16* bias,                \
                    __nv_bfloat16* y, const __grid_constant__ tiled::Wide how) {                                               \
    tiled::wide<rows / 8>(m, x, bias, y, how);                                                                                 \
  }                                                                                                                            \
  extern "C" __global__ void tiled_pack_##rows(const __nv_bfloat16* x, uint4* packed, uint16_t* turned,                        \
                                               const __grid_constant__ int3 how) {                                             \
    tiled::pack<rows / 8>(x, packed, turned, how.x, how.y, how.z);                                                             \
  }
TILED_WIDE(16)
TILED_WIDE(32)
TILED_WIDE(64)
TILED_WIDE(128)
