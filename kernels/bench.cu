// Validates every kernel of the published layout against a host reference, then times them. No Python.
//
//   nvcc -O3 -std=c++17 -arch=sm_90 -o bench bench.cu && ./bench            (./bench --check: odd sizes only, for the sanitizer)
//
// Times are medians over CUDA events with 256 MB overwritten between launches, which empties the L2 cache (60 MB on an H200).
#include <algorithm>
#include <climits>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <queue>
#include <random>
#include <vector>

#include "decode_fast.cu"
#include "decode_paper.cu"
#include "encode.cu"

#define CHECK(call)                                                                             \
  do {                                                                                          \
    const cudaError_t error = (call);                                                           \
    if (error != cudaSuccess) {                                                                 \
      std::fprintf(stderr, "%s:%d %s: %s\n", __FILE__, __LINE__, #call, cudaGetErrorString(error)); \
      std::exit(1);                                                                             \
    }                                                                                           \
  } while (0)

using Bytes = std::vector<uint8_t>;

struct Code { uint8_t lengths[256] = {}; uint32_t codes[256] = {}; Bytes luts; int tables = 0; };
struct Host { Bytes stream, sign_mantissa, gaps; std::vector<uint32_t> positions; };

// A canonical code from lengths, and its tables.
Code make_code(const int (&lengths)[256]) {
  Code c;
  std::vector<int> order;
  for (int e = 0; e < 256; e++) if (lengths[e]) order.push_back(e);
  std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return lengths[a] < lengths[b]; });
  uint64_t next = 0;
  int previous = 0;
  for (int e : order) {
    next <<= lengths[e] - previous;
    previous = lengths[e];
    c.lengths[e] = uint8_t(lengths[e]);
    c.codes[e] = uint32_t(next++);
  }
  std::vector<std::pair<int, uint32_t>> prefixes = {{0, 0}};
  for (int depth = 1; depth < 4; depth++)
    for (int e : order)
      if (lengths[e] > 8 * depth) {
        const std::pair<int, uint32_t> p = {depth, c.codes[e] >> (lengths[e] - 8 * depth)};
        if (std::find(prefixes.begin(), prefixes.end(), p) == prefixes.end()) prefixes.push_back(p);
      }
  c.tables = int(prefixes.size());
  c.luts.assign((c.tables + 1) * 256, 0);
  for (int t = 0; t < c.tables; t++) {
    const auto [depth, value] = prefixes[t];
    for (int e : order) {
      const int length = lengths[e];
      if ((length - 1) / 8 != depth || (c.codes[e] >> (length - 8 * depth)) != value) continue;
      const int open = 8 * (depth + 1) - length;
      for (int k = 0; k < 1 << open; k++) c.luts[t * 256 + ((c.codes[e] << open) & 255) + k] = uint8_t(e);
    }
    for (int child = 1; child < c.tables; child++)
      if (prefixes[child].first == depth + 1 && prefixes[child].second >> 8 == value)
        c.luts[t * 256 + (prefixes[child].second & 255)] = uint8_t(256 - child);
  }
  std::memcpy(&c.luts[c.tables * 256], c.lengths, 256);
  return c;
}

// Huffman lengths. Enough for the histograms made here, whose codes stay below 32 bits.
Code huffman(const std::vector<uint16_t>& weights) {
  int64_t counts[256] = {};
  for (uint16_t w : weights) counts[(w >> 7) & 255]++;
  using Node = std::pair<int64_t, std::vector<int>>;
  std::priority_queue<Node, std::vector<Node>, std::greater<Node>> heap;
  for (int e = 0; e < 256; e++) if (counts[e]) heap.push({counts[e], {e}});
  int lengths[256] = {};
  if (heap.size() == 1) lengths[heap.top().second[0]] = 1;
  while (heap.size() > 1) {
    Node a = heap.top(); heap.pop();
    const Node b = heap.top(); heap.pop();
    a.first += b.first;
    a.second.insert(a.second.end(), b.second.begin(), b.second.end());
    for (int e : a.second) lengths[e]++;
    heap.push(a);
  }
  return make_code(lengths);
}

// The layout bit by bit, as docs/format.md has it.
Host encode_host(const std::vector<uint16_t>& weights, const Code& c) {
  Host h;
  int64_t bit = 0;
  std::vector<uint8_t> gap;
  for (size_t i = 0; i < weights.size(); i++) {
    const int e = (weights[i] >> 7) & 255;
    if (bit / 64 + 1 > int64_t(gap.size())) gap.push_back(uint8_t(bit % 64));
    if (bit / 32768 + 1 > int64_t(h.positions.size())) h.positions.push_back(uint32_t(i));
    for (int k = c.lengths[e] - 1; k >= 0; k--, bit++) {
      if (bit % 8 == 0) h.stream.push_back(0);
      h.stream.back() |= ((c.codes[e] >> k) & 1) << (7 - bit % 8);
    }
    h.sign_mantissa.push_back(uint8_t((weights[i] >> 8 & 0x80) | (weights[i] & 0x7F)));
  }
  if (bit % 8 && bit / 64 + 1 > int64_t(gap.size())) gap.push_back(uint8_t(bit % 64));
  const int64_t blocks = (int64_t(h.stream.size()) + kBlockBytes - 1) / kBlockBytes;
  h.positions.resize(blocks, uint32_t(weights.size()));
  h.positions.push_back(uint32_t(weights.size()));
  gap.resize(blocks * kBlockChunks, 0);
  h.gaps.assign(blocks * kBlockChunks * 5 / 8, 0);
  for (size_t i = 0; i < gap.size() * 5; i++) h.gaps[i / 8] |= ((gap[i / 5] >> (4 - i % 5)) & 1) << (7 - i % 8);
  return h;
}

// Device memory without a byte to spare, so that the sanitizer sees the first wrong one.
template <class T> T* upload(const std::vector<T>& v) {
  T* p;
  CHECK(cudaMalloc(&p, std::max<size_t>(v.size() * sizeof(T), 1)));
  CHECK(cudaMemcpy(p, v.data(), v.size() * sizeof(T), cudaMemcpyHostToDevice));
  return p;
}
template <class T> std::vector<T> download(const T* p, size_t n) {
  std::vector<T> v(n);
  CHECK(cudaMemcpy(v.data(), p, n * sizeof(T), cudaMemcpyDeviceToHost));
  return v;
}
template <class T> T* fresh(size_t n, int fill) {
  T* p;
  CHECK(cudaMalloc(&p, std::max<size_t>(n * sizeof(T), 1)));
  CHECK(cudaMemset(p, fill, n * sizeof(T)));
  return p;
}

double median_seconds(const std::function<void()>& launch, int repeats = 15) {
  static uint8_t* flush = fresh<uint8_t>(256 << 20, 0);
  cudaEvent_t start, stop;
  CHECK(cudaEventCreate(&start));
  CHECK(cudaEventCreate(&stop));
  std::vector<float> ms(repeats);
  for (int i = -3; i < repeats; i++) {
    CHECK(cudaMemsetAsync(flush, i & 255, 256 << 20));
    CHECK(cudaEventRecord(start));
    launch();
    CHECK(cudaEventRecord(stop));
    CHECK(cudaEventSynchronize(stop));
    if (i >= 0) CHECK(cudaEventElapsedTime(&ms[i], start, stop));
  }
  std::sort(ms.begin(), ms.end());
  return ms[repeats / 2] * 1e-3;
}

int processors() {
  int n;
  CHECK(cudaDeviceGetAttribute(&n, cudaDevAttrMultiProcessorCount, 0));
  return n;
}

template <class T> bool same(const char* what, const std::vector<T>& ours, const std::vector<T>& expected) {
  if (ours == expected) return true;
  size_t i = 0;
  while (i < std::min(ours.size(), expected.size()) && ours[i] == expected[i]) i++;
  std::printf("WRONG %s: %zu and %zu entries, the first difference at %zu\n", what, ours.size(), expected.size(), i);
  return false;
}

bool run(const char* name, const std::vector<uint16_t>& weights, const Code& c, bool timed) {
  const int64_t n = int64_t(weights.size());
  const Host h = encode_host(weights, c);
  uint16_t* out = fresh<uint16_t>(n, 0xA5);
  const Unit u = {upload(c.luts), upload(h.stream), upload(h.sign_mantissa), upload(h.gaps), upload(h.positions), out,
                  int64_t(h.stream.size()), n, c.tables};
  uint2* table = fresh<uint2>((1 << kWindow) + 1, 0);
  build_table<<<(1 << kWindow) / 256, 256>>>(u.luts, u.tables, table);
  const int64_t blocks = (u.bytes + kBlockBytes - 1) / kBlockBytes;
  CHECK(cudaFuncSetAttribute(decode_fast, cudaFuncAttributeMaxDynamicSharedMemorySize, sizeof(FastShared)));
  CHECK(cudaFuncSetAttribute(decode_paper, cudaFuncAttributeMaxDynamicSharedMemorySize, sizeof(PaperShared)));
  const int grid = int(std::min<int64_t>(blocks, processors() * kBlocksPerSM));
  Batch batch, twice;
  for (Part& part : batch.parts) part = {u, table, INT_MAX, 0};
  batch.parts[0] = {u, table, 0, grid};
  twice = batch;
  twice.parts[1] = {u, table, grid, grid};
  uint16_t* second = twice.parts[1].unit.out = fresh<uint16_t>(n, 0xA5);
  const auto fast = [&] { decode_fast<<<grid, kFastThreads, sizeof(FastShared)>>>(batch); };
  const auto both = [&] { decode_fast<<<2 * grid, kFastThreads, sizeof(FastShared)>>>(twice); };
  const auto paper = [&] { decode_paper<<<int(blocks), 512, sizeof(PaperShared)>>>(u); };
  bool good = true;
  const std::pair<const char*, std::function<void()>> decoders[] = {{"paper", paper}, {"fast", fast}, {"fast, two units", both}};
  for (const auto& [kernel, launch] : decoders) {
    CHECK(cudaMemset(out, 0xA5, n * 2));
    launch();
    CHECK(cudaGetLastError());
    CHECK(cudaDeviceSynchronize());
    good &= same(kernel, download(out, n), weights);
  }
  good &= same("fast, second unit", download(second, n), weights);

  const int64_t tiles = (n + kTile - 1) / kTile, words = (u.bytes + 3) / 4, chunks = blocks * kBlockChunks;
  int64_t bits = 0;
  for (uint16_t w : weights) bits += c.lengths[(w >> 7) & 255];
  uint16_t* d_weights = upload(weights);
  uint8_t* d_lengths = upload(Bytes(c.lengths, c.lengths + 256));
  uint32_t* d_codes = upload(std::vector<uint32_t>(c.codes, c.codes + 256));
  auto* counts = fresh<unsigned long long>(256, 0);
  uint8_t* sm = fresh<uint8_t>(n, 0);
  int64_t* at = fresh<int64_t>(tiles, 0);
  uint32_t* stream = fresh<uint32_t>(words, 0);
  uint8_t* gaps = fresh<uint8_t>(chunks + 1, 0);
  uint8_t* packed = fresh<uint8_t>(chunks * 5 / 8, 0);
  uint32_t* positions = fresh<uint32_t>(blocks + 1, 0);
  const auto encode = [&] {
    histogram_split<<<processors() * 4, kThreads>>>(d_weights, n, counts, sm);
    tile_bits<<<int(tiles), kThreads>>>(d_weights, n, d_lengths, at);
    scan<<<1, 1024>>>(at, tiles);
    encode_tiles<<<int(tiles), kThreads>>>(d_weights, n, d_lengths, d_codes, at, stream, gaps, positions);
    finish<<<1, 1>>>(reinterpret_cast<uint8_t*>(stream), gaps, positions, n, bits, 0, 0);
    pack_gaps<<<int((chunks / 8 + 255) / 256), 256>>>(gaps, chunks / 8, packed);
  };
  encode();
  CHECK(cudaGetLastError());
  CHECK(cudaDeviceSynchronize());
  good &= same("encode: stream", download(reinterpret_cast<uint8_t*>(stream), u.bytes), h.stream);
  good &= same("encode: sign_mantissa", download(sm, n), h.sign_mantissa);
  good &= same("encode: gaps", download(packed, chunks * 5 / 8), h.gaps);
  good &= same("encode: positions", download(positions, blocks + 1), h.positions);
  std::printf("%-28s %10lld weights, %2d tables, %s", name, (long long)n, c.tables, good ? "bits equal" : "WRONG");
  if (timed) {
    const double bits_per_weight = 8.0 * (u.bytes + n + h.gaps.size() + 4.0 * h.positions.size()) / n;
    uint8_t *a = fresh<uint8_t>(1 << 30, 1), *b = fresh<uint8_t>(1 << 30, 2);
    const double copy = 2.0 * (1 << 30) / median_seconds([&] { CHECK(cudaMemcpyAsync(b, a, 1 << 30, cudaMemcpyDeviceToDevice)); });
    const double limit = copy * 16 / (16 + bits_per_weight);
    const double p = 2e-9 * n / median_seconds(paper), f = 2e-9 * n / median_seconds(fast), e = 2e-9 * n / median_seconds(encode);
    std::printf(", GB/s of bf16: paper %.0f, fast %.0f (%.0f %% of %.0f), encode %.0f", p, f, 1e11 * f / limit, limit / 1e9, e);
    CHECK(cudaFree(a));
    CHECK(cudaFree(b));
  }
  std::printf("\n");
  const void* all[] = {u.luts, u.stream, u.sign_mantissa, u.gaps, u.positions, out, second, table, d_weights, d_lengths, d_codes,
                       counts, sm, at, stream, gaps, packed, positions};
  for (const void* p : all) CHECK(cudaFree(const_cast<void*>(p)));
  return good;
}

std::vector<uint16_t> normal(int64_t n, float std = 0.02f) {
  std::mt19937_64 generator(n);
  std::normal_distribution<float> draw(0, std);
  std::vector<uint16_t> out(n);
  for (auto& w : out) {
    const float value = draw(generator);
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    w = uint16_t((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
  }
  return out;
}

int main(int argc, char** argv) {
  bool good = true;
  for (int64_t n : {1, 7, 15, 16, 17, 1000, 4095, 4097, 100003}) {
    const auto w = normal(n);
    good &= run("normal", w, huffman(w), false);
  }
  for (int64_t n : {1, 64, 32768, 32769, 200001}) {
    const std::vector<uint16_t> w(n, 0x3F80);
    good &= run("one symbol", w, huffman(w), false);
  }
  {  // codes of 1 to 32 bits, all about as often
    int lengths[256] = {};
    for (int i = 0; i < 32; i++) lengths[100 + i] = i + 1;
    lengths[132] = 32;
    std::mt19937 generator(0);
    std::vector<uint16_t> w(70001);
    for (auto& x : w) x = uint16_t((100 + generator() % 33) << 7 | generator() % 128 | (generator() & 1) << 15);
    good &= run("codes of up to 32 bits", w, make_code(lengths), false);
  }
  {  // every pattern below the pointers
    std::vector<uint16_t> w;
    for (int i = 0; i < 1 << 16; i++) if (((i >> 7) & 255) < kFirstPointer) w.push_back(uint16_t(i));
    good &= run("all patterns", w, huffman(w), false);
  }
  if (argc > 1 && !std::strcmp(argv[1], "--check")) return !good;
  const std::pair<int64_t, int64_t> shapes[] = {{2048, 4096}, {4096, 4096}, {28672, 4096}};
  for (const auto& [rows, columns] : shapes) {
    const auto w = normal(rows * columns);
    char name[64];
    std::snprintf(name, sizeof name, "%lldx%lld", (long long)rows, (long long)columns);
    good &= run(name, w, huffman(w), true);
  }
  return !good;
}
