#include <sched.h>

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <list>
#include <memory>
#include <mutex>
#include <random>
#include <thread>

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
    long fences;  // that its PE had made before it
};

struct Link {
    std::mutex mutex;
    std::list<Put> puts;
};

struct State {
    size_t heap_bytes;
    std::vector<char*> heaps;
    std::vector<std::vector<Link>> links;  // [from][to]
    std::unique_ptr<std::atomic<long>[]> fences;
    std::vector<std::thread> threads;
    std::atomic<bool> ends{false};
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
    put.fences = state->fences[rank];
    Link& link = state->links[rank][pe];
    const std::lock_guard<std::mutex> lock(link.mutex);
    link.puts.push_back(std::move(put));
}

void deliver(const Put& put, std::mt19937& random) {
    const uint32_t* from = reinterpret_cast<const uint32_t*>(put.copy.empty() ? put.from : put.copy.data());
    const size_t words = put.bytes / sizeof(uint32_t), first = words ? random() % words : 0;
    for (size_t i = 0; i < words; ++i) {
        const size_t word = (first + i) % words;
        __atomic_store_n(reinterpret_cast<uint32_t*>(put.to) + word, from[word], __ATOMIC_SEQ_CST);
        if (random() % 512 == 0) sched_yield();
    }
    if (put.signal) __atomic_store_n(put.signal, put.value, __ATOMIC_SEQ_CST);
}

// Deliver any of the puts before the first fence that still separates puts.
bool deliver_one(Link& link, std::mt19937& random) {
    const std::lock_guard<std::mutex> lock(link.mutex);
    if (link.puts.empty()) return false;
    long first = link.puts.front().fences;
    for (const Put& put : link.puts) first = std::min(first, put.fences);
    std::vector<std::list<Put>::iterator> candidates;
    for (auto put = link.puts.begin(); put != link.puts.end(); ++put)
        if (put->fences == first) candidates.push_back(put);
    const auto chosen = candidates[random() % candidates.size()];
    if (random() % 4 == 0) std::this_thread::sleep_for(std::chrono::microseconds(random() % 30));
    deliver(*chosen, random);
    link.puts.erase(chosen);
    return true;
}

}  // namespace

Network::Network(int pes, size_t heap_bytes, unsigned seed) {
    state = new State;
    state->heap_bytes = (heap_bytes + 4095) / 4096 * 4096;
    state->fences.reset(new std::atomic<long>[pes]());
    for (int pe = 0; pe < pes; ++pe) {
        state->heaps.push_back(static_cast<char*>(std::aligned_alloc(4096, state->heap_bytes)));
        std::memset(state->heaps[pe], 0, state->heap_bytes);
        state->links.emplace_back(pes);
    }
    for (int pe = 0; pe < pes; ++pe)
        state->threads.emplace_back([pe, pes, seed] {
            std::mt19937 random(seed * 131 + pe);
            while (!state->ends) {
                bool any = false;
                for (int i = 0; i < pes; ++i) any = deliver_one(state->links[pe][random() % pes], random) || any;
                if (!any) std::this_thread::sleep_for(std::chrono::microseconds(20));
            }
        });
}

Network::~Network() {
    state->ends = true;
    for (std::thread& thread : state->threads) thread.join();
    for (char* heap : state->heaps) std::free(heap);
    delete state;
    state = nullptr;
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

void nvshmem_putmem_signal(void* to, const void* from, size_t bytes, uint64_t* signal, uint64_t value, int, int pe) {
    const char* data = static_cast<const char*>(from);
    add({at_pe(static_cast<char*>(to), pe), nullptr, {data, data + bytes}, bytes, at_pe(signal, pe), value, 0}, pe);
}

void nvshmemx_signal_op(uint64_t* signal, uint64_t value, int, int pe) {
    add({nullptr, nullptr, {}, 0, at_pe(signal, pe), value, 0}, pe);
}

void nvshmem_fence() { ++state->fences[rank]; }
