// Which rows of a step belong to which adapter, and the addresses of the adapter's descriptors by site.
#pragma once
#include <cstdint>

// Rows [start, end) of one adapter. sites: their number, then for each the address of a descriptor, or 0.
struct Group {
    int64_t start, end;
    const int64_t* sites;

    template <typename Record>
    const Record* at(int64_t site) const {
        return site < sites[0] ? reinterpret_cast<const Record*>(sites[1 + site]) : nullptr;
    }
};

// In order of their rows, which do not overlap.
struct Groups {
    int64_t count;
    Group items[1];

    const Group* begin() const { return items; }
    const Group* end() const { return items + count; }
};
