// What is needed to pack a weight type, and to find one's way in what is packed.

#pragma once

#include <cstdint>

#include "types.h"

namespace gemloom {

struct Format {
    int block, block_bytes;  // columns of a block; its bytes in GGUF, for one row
    int64_t record_bytes;    // and packed, for 64
    // Packs up to 64 rows of k columns; what is missing to 64 becomes rows of zeros.
    void (*pack)(const uint8_t *rows, int64_t k, int64_t count, void *group);

    int64_t row_bytes(int64_t k) const { return k / block * block_bytes; }
    int64_t group_bytes(int64_t k) const { return k / block * record_bytes; }
};

extern const Format formats[TYPES];

}  // namespace gemloom
