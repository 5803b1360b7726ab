// A number and the epoch (or ticket) it belongs to, in eight bytes that are written and read at once: whoever sees the
// tag has the number, and nobody has to order one write before another.
#pragma once

namespace deepep_moe {

struct alignas(8) Tagged {
    int value, tag;
};

}  // namespace deepep_moe
