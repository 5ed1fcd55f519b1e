// Block tables and sequence lengths of a step: PagedLayout of paged_layout.py.
#pragma once
#include <cstdint>

struct Layout {
    const int32_t* tables;
    int64_t table_width;
    const int32_t* starts;
    const int32_t* lengths;
    int64_t num_sequences, block_size;
};
