// From GGUF's blocks to packed records (types.h draws both ends of it).

#include "pack.h"

#include <cstring>

namespace gemloom {
namespace {

// One row's part of a block: values as unsigned, and per run what it is scaled by.
struct Row {
    uint8_t values[256];
    half scale, minimum;
    uint8_t scales[16], minimums[8];
};

half read_half(const uint8_t *from) {
    half h;
    std::memcpy(&h, from, 2);
    return h;
}

// The 6-bit scales and minima of Q4_K and Q5_K, eight of each in 12 bytes.
void scales_of_k(const uint8_t *s, Row &row) {
    for (int j = 0; j < 4; j++) {
        row.scales[j] = s[j] & 63;
        row.minimums[j] = s[j + 4] & 63;
        row.scales[j + 4] = (s[j + 8] & 15) | (s[j] >> 6 << 4);
        row.minimums[j + 4] = (s[j + 8] >> 4) | (s[j + 4] >> 6 << 4);
    }
}

// 128 bytes of two values each: the low halves of `n` bytes are n values, the high ones the next n.
void read_twos(const uint8_t *from, int n, uint8_t *values) {
    for (int at = 0; at < 128; at += n, values += 2 * n) {
        for (int i = 0; i < n; i++) values[i] = from[at + i] & 15;
        for (int i = 0; i < n; i++) values[n + i] = from[at + i] >> 4;
    }
}

void read(const uint8_t *block, Row &row, Q4_0) {  // scale, 16 x two values
    row.scale = read_half(block);
    for (int i = 0; i < 16; i++) {
        row.values[i] = block[2 + i] & 15;
        row.values[i + 16] = block[2 + i] >> 4;
    }
}

void read(const uint8_t *block, Row &row, Q8_0) {  // scale, 32 values
    row.scale = read_half(block);
    for (int i = 0; i < 32; i++) row.values[i] = block[2 + i] ^ 0x80;
}

void read(const uint8_t *block, Row &row, TQ2_0) {  // 64 x four values, scale
    for (int part = 0; part < 8; part++) {
        const uint8_t *four = block + part / 4 * 32;
        for (int i = 0; i < 32; i++) row.values[32 * part + i] = four[i] >> part % 4 * 2 & 3;
    }
    row.scale = read_half(block + 64);
}

void read(const uint8_t *block, Row &row, Q4_K) {  // scale, minimum, 12 of scales, 128 x two values
    row.scale = read_half(block);
    row.minimum = read_half(block + 2);
    scales_of_k(block + 4, row);
    read_twos(block + 16, 32, row.values);
}

void read(const uint8_t *block, Row &row, Q5_K) {  // as Q4_K, 32 x eight fifth bits before values
    row.scale = read_half(block);
    row.minimum = read_half(block + 2);
    scales_of_k(block + 4, row);
    read_twos(block + 48, 32, row.values);
    for (int part = 0; part < 8; part++) {
        for (int i = 0; i < 32; i++) row.values[32 * part + i] |= (block[16 + i] >> part & 1) << 4;
    }
}

void read(const uint8_t *block, Row &row, Q6_K) {  // 128 x two low, 64 x four high, 16 scales, scale
    read_twos(block, 64, row.values);
    for (int part = 0; part < 8; part++) {
        const uint8_t *high = block + 128 + part / 4 * 32;
        for (int i = 0; i < 32; i++) row.values[32 * part + i] |= (high[i] >> part % 4 * 2 & 3) << 4;
    }
    std::memcpy(row.scales, block + 192, 16);
    row.scale = read_half(block + 208);
}

constexpr int block_bytes(Q4_0) { return 18; }
constexpr int block_bytes(Q8_0) { return 34; }
constexpr int block_bytes(TQ2_0) { return 66; }
constexpr int block_bytes(Q4_K) { return 144; }
constexpr int block_bytes(Q5_K) { return 176; }
constexpr int block_bytes(Q6_K) { return 210; }

// The vectors w0 to w7 of a run, each as one 32-bit word (4 columns) for each of 16 rows.
using Vectors = uint32_t[8][PANEL];

void put_nibbles(uint8_t (&nibbles)[4][VECTOR], const Vectors &w) {
    for (int v = 0; v < 4; v++) {
        uint32_t both[PANEL];
        for (int i = 0; i < PANEL; i++) {
            both[i] = (w[2 * v][i] & 0x0f0f0f0f) | (w[2 * v + 1][i] & 0x0f0f0f0f) << 4;
        }
        std::memcpy(nibbles[v], both, VECTOR);
    }
}

// Bits N and N + 1 of each value.
template <int N> void put_twos(uint8_t (&twos)[2][VECTOR], const Vectors &w) {
    for (int u = 0; u < 2; u++) {
        uint32_t four[PANEL] = {};
        for (int j = 0; j < 4; j++) {
            for (int i = 0; i < PANEL; i++) four[i] |= (w[4 * u + j][i] >> N & 0x03030303) << 2 * j;
        }
        std::memcpy(twos[u], four, VECTOR);
    }
}

void put(Q4_0::Run &run, int panel, const Vectors &w) { put_nibbles(run.nibbles[panel], w); }
void put(Q4_K::Run &run, int panel, const Vectors &w) { put_nibbles(run.nibbles[panel], w); }
void put(Q8_0::Run &run, int panel, const Vectors &w) { std::memcpy(run.bytes[panel], w, sizeof w); }
void put(TQ2_0::Run &run, int panel, const Vectors &w) { put_twos<0>(run.twos[panel], w); }
void put(Q6_K::Run &run, int panel, const Vectors &w) {
    put_nibbles(run.nibbles[panel], w);
    put_twos<4>(run.twos[panel], w);
}
void put(Q5_K::Run &run, int panel, const Vectors &w) {
    put_nibbles(run.nibbles[panel], w);
    uint32_t eight[PANEL] = {};
    for (int j = 0; j < 8; j++) {
        for (int i = 0; i < PANEL; i++) eight[i] |= (w[j][i] >> 4 & 0x01010101) << j;
    }
    std::memcpy(run.ones[panel], eight, VECTOR);
}

// Of row `at` of the group.
template <class W> void put_scales(typename W::Record &record, int at, const Row &row) {
    record.scale[at] = row.scale;
    if constexpr (W::MINIMUM) record.minimum[at] = row.minimum;
    for (int r = 0; r < W::BLOCK / RUN; r++) {
        [[maybe_unused]] auto &run = record.runs[r];
        if constexpr (W::SCALES == 2) {
            for (int h = 0; h < 2; h++) run.scale[h][at] = static_cast<int8_t>(row.scales[2 * r + h]);
        } else if constexpr (W::MINIMUM) {
            run.scale[at] = row.scales[r];
            run.minimum[at] = row.minimums[r];
        }
    }
}

template <class W> void put_panel(typename W::Record &record, int panel, const Row (&rows)[PANEL]) {
    for (int i = 0; i < PANEL; i++) put_scales<W>(record, panel * PANEL + i, rows[i]);
    for (int r = 0; r < W::BLOCK / RUN; r++) {
        Vectors w;
        for (int j = 0; j < 8; j++) {
            for (int i = 0; i < PANEL; i++) std::memcpy(&w[j][i], rows[i].values + r * RUN + 4 * j, 4);
        }
        put(record.runs[r], panel, w);
    }
}

template <class W> void pack_group(const uint8_t *from, int64_t k, int64_t count, void *to) {
    const int64_t blocks = k / W::BLOCK, row_bytes = blocks * block_bytes(W{});
    auto *records = static_cast<typename W::Record *>(to);
    Row rows[PANEL];
    for (int64_t b = 0; b < blocks; b++) {
        for (int panel = 0; panel < PANELS; panel++) {
            for (int i = 0; i < PANEL; i++) {
                const int64_t row = panel * PANEL + i;
                if (row < count) read(from + row * row_bytes + b * block_bytes(W{}), rows[i], W{});
                else rows[i] = {};
            }
            put_panel<W>(records[b], panel, rows);
        }
    }
}

template <class W> constexpr Format format() {
    return {W::BLOCK, block_bytes(W{}), sizeof(typename W::Record), pack_group<W>};
}

}  // namespace

const Format formats[TYPES] = {format<Q4_0>(), format<Q8_0>(), format<TQ2_0>(),
                               format<Q4_K>(), format<Q5_K>(), format<Q6_K>()};

}  // namespace gemloom
