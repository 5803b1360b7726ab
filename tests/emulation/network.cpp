#include <cstdio>
#include <cstdlib>
#include <list>

#include "nvshmem.h"

namespace emulation {

namespace {

// A put that has not been delivered. Data of puts that do not wait is read when it is delivered.
struct Put {
    char* to;
    const char* from;
    std::vector<char> copy;
    size_t bytes;
    uint64_t* signal;
    uint64_t value;
    long fences;        // that its PE had made before it
    bool adds = false;  // to the signal
};

// From one PE to another. Puts are delivered one after the other, word by word.
struct Link {
    std::list<Put> puts;
    Task* task = nullptr;
    bool waits = false;  // for a put
};

struct State {
    size_t heap_bytes;
    std::vector<char*> heaps;
    std::vector<std::vector<Link>> links;  // [from][to]
    std::vector<long> fences;              // [PE]
};
State* state = nullptr;

// The same place in the heap of `pe`.
template <typename T>
T* at_pe(T* own, int pe) {
    const char* mine = state->heaps[rank];
    const char* place = reinterpret_cast<const char*>(own);
    if (place < mine || place >= mine + state->heap_bytes) {
        std::fprintf(stderr, "PE %d: not in its symmetric memory\n", rank);
        std::abort();
    }
    return reinterpret_cast<T*>(state->heaps[pe] + (place - mine));
}

void add(Put put, int pe) {
    disturb();
    put.fences = state->fences[rank];
    Link& link = state->links[rank][pe];
    link.puts.push_back(std::move(put));
    if (link.waits) wake(link.task);
    link.waits = false;
}

// Take out any of the puts before the first fence that still separates puts.
Put take(Link& link) {
    long first = link.puts.front().fences;
    for (const Put& put : link.puts) first = std::min(first, put.fences);
    std::vector<std::list<Put>::iterator> candidates;
    for (auto put = link.puts.begin(); put != link.puts.end(); ++put)
        if (put->fences == first) candidates.push_back(put);
    const auto chosen = candidates[random() % candidates.size()];
    Put put = std::move(*chosen);
    link.puts.erase(chosen);
    return put;
}

void deliver(const Put& put) {
    const uint32_t* from = reinterpret_cast<const uint32_t*>(put.copy.empty() ? put.from : put.copy.data());
    const size_t words = put.bytes / sizeof(uint32_t), first = words ? random() % words : 0;
    if (put.signal && fault == Fault::kEarlySignals) *put.signal = put.value;
    const size_t pause = random() % 8 ? words : random() % (words + 1);
    for (size_t i = 0; i < words; ++i) {
        if (i == pause) sleep(random() % 20000);
        const size_t word = (first + i) % words;
        std::memcpy(put.to + word * sizeof(uint32_t), from + word, sizeof(uint32_t));
        if (random() % 64 == 0) yield();
    }
    disturb();
    if (put.signal) *put.signal = put.value + (put.adds ? *put.signal : 0);
}

void serve(Link& link) {
    while (true) {
        if (link.puts.empty()) {
            link.waits = true;
            park();
        }
        if (random() % 4 == 0) sleep(random() % 5000);
        deliver(take(link));
        yield();
    }
}

}  // namespace

Network::Network(int pes, size_t heap_bytes) {
    state = new State;
    state->heap_bytes = (heap_bytes + 4095) / 4096 * 4096;
    state->fences.resize(pes);
    for (int pe = 0; pe < pes; ++pe) {
        const uintptr_t memory = reinterpret_cast<uintptr_t>(std::calloc(state->heap_bytes + 4096, 1));
        state->heaps.push_back(reinterpret_cast<char*>((memory + 4095) / 4096 * 4096));
        state->links.emplace_back(pes);
    }
    for (int pe = 0; pe < pes; ++pe)
        for (Link& link : state->links[pe]) link.task = start_program(pe, [&link] { serve(link); }, false);
}

char* Network::heap(int pe) const { return state->heaps[pe]; }

}  // namespace emulation

using namespace emulation;

void nvshmem_int_p(int* to, int value, int pe) {
    const char* bytes = reinterpret_cast<const char*>(&value);
    add({reinterpret_cast<char*>(at_pe(to, pe)), nullptr, {bytes, bytes + sizeof(value)}, sizeof(value), nullptr, 0, 0},
        pe);
}

void nvshmemx_putmem_signal_nbi_warp(void* to, const void* from, size_t bytes, uint64_t* signal, uint64_t value, int,
                                     int pe) {
    __syncwarp();
    if (lane() != 0) return;
    const char* data = static_cast<const char*>(from);
    at_pe(data, pe);  // the source is in symmetric memory as well
    add({at_pe(static_cast<char*>(to), pe), data, {}, bytes, at_pe(signal, pe), value, 0}, pe);
}

void nvshmemx_putmem_signal_nbi_block(void* to, const void* from, size_t bytes, uint64_t* signal, uint64_t value, int,
                                      int pe) {
    __syncthreads();
    if (task->current != 0) return;
    const char* data = static_cast<const char*>(from);
    at_pe(data, pe);  // the source is in symmetric memory as well
    add({at_pe(static_cast<char*>(to), pe), data, {}, bytes, at_pe(signal, pe), value, 0}, pe);
}

void nvshmem_putmem_signal(void* to, const void* from, size_t bytes, uint64_t* signal, uint64_t value, int, int pe) {
    const char* data = static_cast<const char*>(from);
    add({at_pe(static_cast<char*>(to), pe), nullptr, {data, data + bytes}, bytes, at_pe(signal, pe), value, 0}, pe);
}

void nvshmemx_signal_op(uint64_t* signal, uint64_t value, int operation, int pe) {
    add({nullptr, nullptr, {}, 0, at_pe(signal, pe), value, 0, operation == NVSHMEM_SIGNAL_ADD}, pe);
}

void nvshmem_fence() { ++state->fences[rank]; }
