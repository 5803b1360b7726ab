// A value and its epoch (or ticket), in eight bytes that are written and read at once. A reader that sees the tag has
// the value too, so the two writes need no ordering.
#pragma once

namespace deepep_moe {

struct alignas(8) Tagged {
    int value, tag;
};

}  // namespace deepep_moe
