// Which rows of a step belong to which adapter, and where it is said what that adapter does at each site.
#pragma once
#include <cstdint>

// Rows [start, end). sites: how many there are, then for each the address of a record, or 0 for none.
struct Group {
    int64_t start, end;
    const int64_t* sites;

    template <typename Record>
    const Record* at(int64_t site) const {
        return site < sites[0] ? reinterpret_cast<const Record*>(sites[1 + site]) : nullptr;
    }
};

// In order of their rows, which they do not share.
struct Groups {
    int64_t count;
    Group items[1];

    const Group* begin() const { return items; }
    const Group* end() const { return items + count; }
};
