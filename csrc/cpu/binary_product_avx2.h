// Products of packed rows by table lookup, 256 bits wide. Included inside the avx2 namespace; no include guard.
//
//   formula   For a nibble v of a weight row and b of a left row, t = popcount(v & b) - ceil(popcount(v) / 2) -
//             floor(popcount(b) / 2) + 2 is 0, 1 or 2, and
//             dot = length - 2 * bits + 4 * sum(t) + 2 * odd(weights) - 2 * odd(left), odd = nibbles with an odd count
//   layout    Left rows become tables of 16 bytes a nibble, one for two rows: t of the first + 16 * t of the second.
//             Weights, arranged, are the indices: one shuffle looks up 32 weight rows for two left rows.
//             A segment is 128 nibbles: 18 groups of 7, whose sums fit in four bits, and two nibbles more
//   bytes     a weight bit is read once for every 64 left rows; tables are 8 bytes a left nibble
//   numerics  exact; fields of four bits are added up without carries into each other, see `decode`

constexpr int64_t kPanel = 8;                // left rows whose tables are used together: 4 tables
constexpr int64_t kGroupRows = 64;           // left rows an item takes at most
constexpr int64_t kTableBytes = 64;          // of a panel, a nibble
constexpr int64_t kSegmentBytes = 64;        // of a row: 128 nibbles
constexpr int64_t kGroup = 7;                // nibbles whose t add up to at most 14
constexpr int64_t kPanelsBytes = 512 << 10;  // tables of an item should stay in the second-level cache
constexpr int64_t kOutputRows = 16;          // left rows whose sums are written together
constexpr int64_t kBlockBytes = 8192;        // of a row: sums of t up to here fit in 16 bits

QK_LANE int table_entry(int v, int b) {
  return __builtin_popcount(v & b) - (__builtin_popcount(v) + 1) / 2 - __builtin_popcount(b) / 2 + 2;
}

// entry[b0 | b1 << 4] is the table of two left nibbles, or of one: single[b].
struct Tables {
  alignas(64) uint8_t pair[256][16];
  alignas(64) uint8_t single[16][16];
  Tables() {
    for (int b = 0; b < 256; ++b)
      for (int v = 0; v < 16; ++v)
        pair[b][v] = static_cast<uint8_t>(table_entry(v, b & 15) + 16 * table_entry(v, b >> 4));
    for (int b = 0; b < 16; ++b)
      for (int v = 0; v < 16; ++v) single[b][v] = static_cast<uint8_t>(table_entry(v, b));
  }
};
static const Tables& lookup_tables() {
  static const Tables tables;
  return tables;
}

// Where an item keeps things in its scratch memory; without memory only how much it takes.
struct Places {
  int32_t *dots, *odd, *carried;
  uint16_t* sums;
  uint8_t *index, *tables, *rows;
  size_t bytes;
};
static Places places(const BinaryProduct& p, int64_t count, uint8_t* memory) {
  const int64_t panels = (count + kPanel - 1) / kPanel;
  size_t at = 0;
  const auto take = [&](size_t bytes) {
    uint8_t* here = memory ? memory + at : nullptr;
    at += (bytes + 63) / 64 * 64;
    return here;
  };
  Places s;
  s.dots = reinterpret_cast<int32_t*>(take(kOutputRows * kTile * sizeof(int32_t)));
  s.odd = reinterpret_cast<int32_t*>(take(panels * kPanel * sizeof(int32_t)));
  s.sums = reinterpret_cast<uint16_t*>(take(panels * kPanel * kTile * sizeof(uint16_t)));
  s.carried = reinterpret_cast<int32_t*>(take(p.bytes > kBlockBytes ? count * kTile * sizeof(int32_t) : 0));
  s.index = take(2 * kSegmentBytes * kTile);
  s.tables = take(panels * 2 * p.bytes * kTableBytes);
  s.rows = take(panels * kPanel * p.bytes);
  s.bytes = at;
  return s;
}

static int64_t rows_together(const BinaryProduct& p) {
  const int64_t panels = kPanelsBytes / (2 * (p.bytes ? p.bytes : 1) * kTableBytes);
  return panels >= kGroupRows / kPanel ? kGroupRows : panels <= 1 ? kPanel : panels * kPanel;
}

// Sixteen bytes of two rows at a time become the numbers of their tables: low nibbles, then high ones.
static void make_tables(const uint8_t* rows, int64_t bytes, uint8_t* out) {
  const Tables& tables = lookup_tables();
  const __m128i low = _mm_set1_epi8(15);
  alignas(16) uint8_t numbers[kPanel / 2][2][16];
  for (int64_t k = 0; k < bytes; k += 16) {
    const int64_t width = bytes - k < 16 ? bytes - k : 16;
    for (int r = 0; r < kPanel / 2; ++r) {
      const auto at = [&](int row) {
        alignas(16) uint8_t part[16] = {};
        std::memcpy(part, rows + row * bytes + k, width);
        return _mm_load_si128(reinterpret_cast<const __m128i*>(part));
      };
      const __m128i x = at(2 * r), y = at(2 * r + 1);
      auto* to = reinterpret_cast<__m128i*>(numbers[r]);
      _mm_store_si128(to, _mm_or_si128(_mm_and_si128(x, low), _mm_slli_epi16(_mm_and_si128(y, low), 4)));
      _mm_store_si128(to + 1, _mm_or_si128(_mm_and_si128(_mm_srli_epi16(x, 4), low), _mm_andnot_si128(low, y)));
    }
    for (int64_t i = 0; i < width; ++i) {
      auto* to = reinterpret_cast<__m128i*>(out + 2 * (k + i) * kTableBytes);
      for (int half = 0; half < 2; ++half)
        for (int r = 0; r < kPanel / 2; ++r)
          _mm_store_si128(to++, _mm_load_si128(reinterpret_cast<const __m128i*>(tables.pair[numbers[r][half][i]])));
    }
  }
}

static bool prepare(const BinaryProduct& p, int64_t first, int64_t count, Scratch& scratch) {
  uint8_t* memory = scratch.get(places(p, count, nullptr).bytes);
  if (!memory) return false;
  const Places s = places(p, count, memory);
  const int64_t panels = (count + kPanel - 1) / kPanel;
  p.rows(p.source, first, count, s.rows);
  std::memset(s.rows + count * p.bytes, 0, (panels * kPanel - count) * p.bytes);
  for (int64_t r = 0; r < panels * kPanel; ++r) s.odd[r] = count_odd_nibbles(s.rows + r * p.bytes, p.bytes);
  if (count == 1) return true;
  for (int64_t panel = 0; panel < panels; ++panel)
    make_tables(s.rows + panel * kPanel * p.bytes, p.bytes, s.tables + panel * 2 * p.bytes * kTableBytes);
  return true;
}

// Blocks of 32 arranged weight rows as one nibble a byte: [nibble][kBlocks][32].
template <int kBlocks>
static void split_nibbles(const uint8_t* arranged, int64_t block_stride, int64_t bytes, uint8_t* index) {
  const __m256i low = _mm256_set1_epi8(15);
  for (int64_t k = 0; k < bytes; ++k) {
    for (int w = 0; w < kBlocks; ++w) {
      const __m256i both =
          _mm256_load_si256(reinterpret_cast<const __m256i*>(arranged + w * block_stride + k * kRowsTogether));
      auto* to = reinterpret_cast<__m256i*>(index + (2 * k * kBlocks + w) * kRowsTogether);
      _mm256_store_si256(to, _mm256_and_si256(both, low));
      _mm256_store_si256(to + kBlocks, _mm256_and_si256(_mm256_srli_epi16(both, 4), low));
    }
  }
}

// What the groups of a segment add up to, byte by byte modulo 256: fields is sum(low + 16 * high) over a byte's two
// fields; shifted, of 16-bit lanes moved right by four bits, sum(high of the even byte + 16 * low of the odd byte) in
// the even byte and sum(high of the odd byte) in the odd one. Each sum is at most 18 * 14 = 252.
struct Sums {
  __m256i fields, shifted;
};

// The four sums of every 16-bit lane, and those of up to 6 nibbles more, added to 16 columns of two rows each.
QK_LANE void decode(Sums s, __m256i rest, uint16_t* first, uint16_t* second) {
  const __m256i byte = _mm256_set1_epi16(255), four = _mm256_set1_epi16(15);
  const __m256i high_odd = _mm256_srli_epi16(s.shifted, 8);
  const __m256i low_odd =
      _mm256_and_si256(_mm256_sub_epi16(_mm256_srli_epi16(s.fields, 8), _mm256_slli_epi16(high_odd, 4)), byte);
  const __m256i high_even = _mm256_and_si256(_mm256_sub_epi16(s.shifted, _mm256_slli_epi16(low_odd, 4)), byte);
  const __m256i low_even = _mm256_and_si256(_mm256_sub_epi16(s.fields, _mm256_slli_epi16(high_even, 4)), byte);
  const auto add = [](uint16_t* to, __m256i sum, __m256i more) {
    auto* at = reinterpret_cast<__m256i*>(to);
    _mm256_store_si256(at, _mm256_add_epi16(_mm256_load_si256(at), _mm256_add_epi16(sum, more)));
  };
  add(first, low_even, _mm256_and_si256(rest, four));
  add(first + 16, low_odd, _mm256_and_si256(_mm256_srli_epi16(rest, 8), four));
  add(second, high_even, _mm256_and_si256(_mm256_srli_epi16(rest, 4), four));
  add(second + 16, high_odd, _mm256_srli_epi16(rest, 12));
}

// One nibble, kBlocks x kPairs lookups.
template <int kBlocks, int kPairs>
QK_LANE void look_up(const uint8_t* tables, const uint8_t* index, __m256i (&sum)[kPairs][kBlocks]) {
  for (int r = 0; r < kPairs; ++r) {
    const __m256i table = _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(tables) + r));
    for (int w = 0; w < kBlocks; ++w) {
      const __m256i at = _mm256_load_si256(reinterpret_cast<const __m256i*>(index) + w);
      sum[r][w] = _mm256_add_epi8(sum[r][w], _mm256_shuffle_epi8(table, at));
    }
  }
}

template <int kBlocks, int kPairs>
static void add_groups(const uint8_t* tables, const uint8_t* index, int64_t groups, Sums (&sums)[kPairs][kBlocks]) {
  for (int64_t g = 0; g < groups; ++g) {
    __m256i sum[kPairs][kBlocks] = {};
    for (int k = 0; k < kGroup; ++k)
      look_up(tables + (g * kGroup + k) * kTableBytes, index + (g * kGroup + k) * kBlocks * kRowsTogether, sum);
    for (int r = 0; r < kPairs; ++r) {
      for (int w = 0; w < kBlocks; ++w) {
        sums[r][w].fields = _mm256_add_epi8(sums[r][w].fields, sum[r][w]);
        sums[r][w].shifted = _mm256_add_epi8(sums[r][w].shifted, _mm256_srli_epi16(sum[r][w], 4));
      }
    }
  }
}

// The main cases, registers by name: 12 or 8 sums, two index vectors (the third is read where it is used), a table and
// what it gave. The compiler would reorder the lookups and spill. op is the lookup of a group's first nibble, which
// sets the sums, or of the others.
#define QK_SET(index, sum) "vpshufb " index ", %%ymm14, %%ymm" sum "\n\t"
#define QK_ADD(index, sum) "vpshufb " index ", %%ymm14, %%ymm15\n\tvpaddb %%ymm15, %%ymm" sum ", %%ymm" sum "\n\t"
#define QK_TABLE(offset) "vbroadcasti128 " offset "(%[tables]), %%ymm14\n\t"
#define QK_INDEX "vmovdqa (%[index]), %%ymm12\n\tvmovdqa 32(%[index]), %%ymm13\n\t"
#define QK_PAIR3(op, offset, a, b, c) QK_TABLE(offset) op("%%ymm12", a) op("%%ymm13", b) op("64(%[index])", c)
#define QK_PAIR2(op, offset, a, b) QK_TABLE(offset) op("%%ymm12", a) op("%%ymm13", b)
#define QK_NIBBLE3(op) \
  QK_INDEX QK_PAIR3(op, "0", "0", "1", "2") QK_PAIR3(op, "16", "3", "4", "5")                         \
      QK_PAIR3(op, "32", "6", "7", "8") QK_PAIR3(op, "48", "9", "10", "11") "addq $64, %[tables]\n\t" \
                                                                            "addq $96, %[index]\n\t"
#define QK_NIBBLE2(op) \
  QK_INDEX QK_PAIR2(op, "0", "0", "1") QK_PAIR2(op, "16", "2", "3") QK_PAIR2(op, "32", "4", "5") \
      QK_PAIR2(op, "48", "6", "7") "addq $64, %[tables]\n\t"                                    \
                                   "addq $64, %[index]\n\t"
#define QK_GROUP(nibble) \
  nibble(QK_SET) nibble(QK_ADD) nibble(QK_ADD) nibble(QK_ADD) nibble(QK_ADD) nibble(QK_ADD) nibble(QK_ADD)
// Into the sums of a segment: see Sums.
#define QK_FLUSH(offset, sum)                                                    \
  "vpaddb " #offset "(%[sums]), %%ymm" #sum ", %%ymm14\n\tvpsrlw $4, %%ymm" #sum \
  ", %%ymm15\n\t"                                                                \
  "vmovdqa %%ymm14, " #offset "(%[sums])\n\tvpaddb 32+" #offset                  \
  "(%[sums]), %%ymm15, %%ymm15\n\t"                                              \
  "vmovdqa %%ymm15, 32+" #offset "(%[sums])\n\t"
#define QK_FLUSH8 \
  QK_FLUSH(0, 0)  \
  QK_FLUSH(64, 1) QK_FLUSH(128, 2) QK_FLUSH(192, 3) QK_FLUSH(256, 4) QK_FLUSH(320, 5) QK_FLUSH(384, 6) QK_FLUSH(448, 7)
#define QK_FLUSH12 QK_FLUSH8 QK_FLUSH(512, 8) QK_FLUSH(576, 9) QK_FLUSH(640, 10) QK_FLUSH(704, 11)
#define QK_GROUPS(nibble, flush)                                                                                     \
  if (groups == 0) return;                                                                                           \
  __asm__ volatile("1:\n\t" QK_GROUP(nibble) flush "decq %[groups]\n\tjnz 1b\n\t"                                    \
                   : [tables] "+r"(tables), [index] "+r"(index), [groups] "+r"(groups)                               \
                   : [sums] "r"(&sums[0][0])                                                                         \
                   : "memory", "cc", "ymm0", "ymm1", "ymm2", "ymm3", "ymm4", "ymm5", "ymm6", "ymm7", "ymm8", "ymm9", \
                     "ymm10", "ymm11", "ymm12", "ymm13", "ymm14", "ymm15")
static void add_groups(const uint8_t* tables, const uint8_t* index, int64_t groups, Sums (&sums)[4][3]) {
  QK_GROUPS(QK_NIBBLE3, QK_FLUSH12);
}
static void add_groups(const uint8_t* tables, const uint8_t* index, int64_t groups, Sums (&sums)[4][2]) {
  QK_GROUPS(QK_NIBBLE2, QK_FLUSH8);
}

// A segment of one panel: adds sum(t) to kBlocks * 32 columns of 2 * kPairs rows, kTile apart.
template <int kBlocks, int kPairs>
static void add_segment(const uint8_t* tables, const uint8_t* index, int64_t nibbles, uint16_t* out) {
  Sums sums[kPairs][kBlocks] = {};
  const int64_t rest = nibbles >= 2 * kSegmentBytes ? 2 : nibbles % kGroup, groups = (nibbles - rest) / kGroup;
  add_groups(tables, index, groups, sums);
  __m256i more[kPairs][kBlocks] = {};
  for (int64_t k = nibbles - rest; k < nibbles; ++k)
    look_up(tables + k * kTableBytes, index + k * kBlocks * kRowsTogether, more);
  for (int r = 0; r < kPairs; ++r)
    for (int w = 0; w < kBlocks; ++w)
      decode(sums[r][w], more[r][w], out + 2 * r * kTile + w * kRowsTogether,
             out + (2 * r + 1) * kTile + w * kRowsTogether);
}

template <int kBlocks>
static void add_panel(int64_t pairs, const uint8_t* tables, const uint8_t* index, int64_t nibbles, uint16_t* out) {
  if (pairs == 4) return add_segment<kBlocks, 4>(tables, index, nibbles, out);
  if (pairs == 3) return add_segment<kBlocks, 3>(tables, index, nibbles, out);
  if (pairs == 2) return add_segment<kBlocks, 2>(tables, index, nibbles, out);
  add_segment<kBlocks, 1>(tables, index, nibbles, out);
}

template <int kBlocks>
static void add_tile(const BinaryProduct& p, const Places& s, int64_t count, const uint8_t* arranged, int64_t from,
                     int64_t to) {
  for (int64_t k = from; k < to; k += kSegmentBytes) {
    const int64_t bytes = to - k < kSegmentBytes ? to - k : kSegmentBytes;
    split_nibbles<kBlocks>(arranged + k * kRowsTogether, p.bytes * kRowsTogether, bytes, s.index);
    for (int64_t r = 0; r < count; r += kPanel) {
      const int64_t pairs = count - r >= kPanel ? kPanel / 2 : (count - r + 1) / 2;
      add_panel<kBlocks>(pairs, s.tables + (r / kPanel * p.bytes + k) * 2 * kTableBytes, s.index, 2 * bytes,
                         s.sums + r * kTile);
    }
  }
}

// One left row: tables of a byte a lookup, so that sums fit in bytes for 126 nibbles.
template <int kBlocks>
static void add_one_row(const BinaryProduct& p, const Places& s, int64_t, const uint8_t* arranged, int64_t begin,
                        int64_t end) {
  const Tables& tables = lookup_tables();
  const int64_t stride = p.bytes * kRowsTogether;
  const __m256i four = _mm256_set1_epi8(15), byte = _mm256_set1_epi16(255);
  for (int64_t from = begin; from < end; from += 63) {
    const int64_t to = end - from < 63 ? end : from + 63;
    __m256i sum[kBlocks] = {};
    for (int64_t k = from; k < to; ++k) {
      const unsigned x = s.rows[k];
      const auto table = [&](unsigned b) {
        return _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(tables.single[b])));
      };
      const __m256i low = table(x & 15u), high = table(x >> 4);
      for (int w = 0; w < kBlocks; ++w) {
        const __m256i both =
            _mm256_load_si256(reinterpret_cast<const __m256i*>(arranged + w * stride + k * kRowsTogether));
        sum[w] = _mm256_add_epi8(sum[w], _mm256_shuffle_epi8(low, _mm256_and_si256(both, four)));
        sum[w] = _mm256_add_epi8(sum[w], _mm256_shuffle_epi8(high, _mm256_and_si256(_mm256_srli_epi16(both, 4), four)));
      }
    }
    for (int w = 0; w < kBlocks; ++w) {
      auto* at = reinterpret_cast<__m256i*>(s.sums + w * kRowsTogether);
      _mm256_store_si256(at, _mm256_add_epi16(_mm256_load_si256(at), _mm256_and_si256(sum[w], byte)));
      _mm256_store_si256(at + 1, _mm256_add_epi16(_mm256_load_si256(at + 1), _mm256_srli_epi16(sum[w], 8)));
    }
  }
}

template <int kBlocks>
static void add_rows(const BinaryProduct& p, const Places& s, int64_t count, const uint8_t* arranged, int64_t from,
                     int64_t to) {
  (count == 1 ? add_one_row<kBlocks> : add_tile<kBlocks>)(p, s, count, arranged, from, to);
}

// The sums of rows [from, from + count) of an item: 4 * sum(t) + what does not depend on both rows + what longer rows
// have left in `carried`.
static void finish_dots(const BinaryProduct& p, const Places& s, int64_t from, int64_t count, int64_t column,
                        const int32_t* carried) {
  const auto* odd = reinterpret_cast<const int32_t*>(p.arranged + arranged_rows(p.n) * p.bytes) + column;
  const int64_t width = arranged_rows(p.n) - column < kTile ? arranged_rows(p.n) - column : kTile;
  for (int64_t r = 0; r < count; ++r) {
    const int32_t base = static_cast<int32_t>(p.length - 16 * p.bytes) - 2 * s.odd[from + r];
    const uint16_t* sums = s.sums + (from + r) * kTile;
    int32_t* dots = s.dots + r * kTile;
    for (int64_t c = 0; c < width; ++c) dots[c] = base + 2 * odd[c] + 4 * static_cast<int32_t>(sums[c]);
    if (!carried) continue;
    for (int64_t c = 0; c < width; ++c) dots[c] += carried[(from + r) * kTile + c];
  }
}

static void clear_sums(const Places& s, int64_t count) {
  std::memset(s.sums, 0, (count + kPanel - 1) / kPanel * kPanel * kTile * sizeof(uint16_t));
}

// All of a row but its last kBlockBytes: sums of t leave 16 bits now and then.
template <int kBlocks>
static int64_t carry_blocks(const BinaryProduct& p, const Places& s, int64_t count, const uint8_t* arranged) {
  std::memset(s.carried, 0, count * kTile * sizeof(int32_t));
  int64_t from = 0;
  for (; p.bytes - from > kBlockBytes; from += kBlockBytes) {
    clear_sums(s, count);
    add_rows<kBlocks>(p, s, count, arranged, from, from + kBlockBytes);
    for (int64_t i = 0; i < count * kTile; ++i) s.carried[i] += 4 * static_cast<int32_t>(s.sums[i]);
  }
  return from;
}

// Sums as they are, to rows of the output: the common case, without a stop in memory.
static void write_sums(const BinaryProduct& p, const Places& s, int64_t first, int64_t count, int64_t column,
                       int64_t width) {
  const auto* odd = reinterpret_cast<const int32_t*>(p.arranged + arranged_rows(p.n) * p.bytes) + column;
  for (int64_t r = 0; r < count; ++r) {
    const int32_t base = static_cast<int32_t>(p.length - 16 * p.bytes) - 2 * s.odd[r];
    const uint16_t* sums = s.sums + r * kTile;
    float* out = p.values + (first + r) * p.n + column;
    for (int64_t c = 0; c < width; ++c)
      out[c] = static_cast<float>(base + 2 * odd[c] + 4 * static_cast<int32_t>(sums[c]));
  }
}

template <int kBlocks>
static void sum_tile(const BinaryProduct& p, const Places& s, int64_t first, int64_t count, int64_t column,
                     int64_t width) {
  const uint8_t* arranged = p.arranged + column * p.bytes;
  const bool carries = p.bytes > kBlockBytes;
  const int64_t from = carries ? carry_blocks<kBlocks>(p, s, count, arranged) : 0;
  clear_sums(s, count);
  add_rows<kBlocks>(p, s, count, arranged, from, p.bytes);
  if (p.values && !p.plane && !p.scale && !p.bias && !p.correct && !carries)
    return write_sums(p, s, first, count, column, width);
  for (int64_t r = 0; r < count; r += kOutputRows) {
    const int64_t rows = count - r < kOutputRows ? count - r : kOutputRows;
    finish_dots(p, s, r, rows, column, carries ? s.carried : nullptr);
    write_output(p, first + r, rows, column, width, s.dots);
  }
}

static void columns(const BinaryProduct& p, int64_t first, int64_t count, int64_t begin, int64_t end,
                    Scratch& scratch) {
  const Places s = places(p, count, scratch.get(0));
  for (int64_t column = begin; column < end;) {
    // Three blocks at a time; four that are left go in two pairs, since one alone is slow.
    const int64_t left = (end - column + kRowsTogether - 1) / kRowsTogether;
    const int64_t blocks = left == 4 ? 2 : left < 3 ? left : 3;
    const int64_t width = end - column < blocks * kRowsTogether ? end - column : blocks * kRowsTogether;
    (blocks == 3 ? sum_tile<3> : blocks == 2 ? sum_tile<2> : sum_tile<1>)(p, s, first, count, column, width);
    column += width;
  }
}

static const BinaryKernels binary_kernels{true, kTile, rows_together, prepare, columns};
