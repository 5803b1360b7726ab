#include "cuda.h"

#include <sched.h>

#include <cstdlib>
#include <memory>
#include <thread>

namespace emulation {

thread_local Block* block = nullptr;
thread_local int rank = 0;

namespace {

constexpr size_t kStackBytes = 32 << 10;

extern "C" void emulation_switch(void** from, void* to);
asm(R"(
.text
.globl emulation_switch
emulation_switch:
    pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp
    ret
)");

void run_fiber() {
    (*block->body)();
    block->fibers[block->current].done = true;
    --block->alive;
    while (true) yield();
}

void run_block(unsigned number, unsigned grid, int threads, const std::function<void()>& body) {
    Block mine;
    mine.number = number;
    mine.grid = grid;
    mine.body = &body;
    mine.alive = threads;
    mine.warps.resize(threads / 32);
    const std::unique_ptr<char[]> stacks(new char[kStackBytes * threads + 16]);
    for (int t = 0; t < threads; ++t) {
        const uintptr_t end = reinterpret_cast<uintptr_t>(stacks.get()) + kStackBytes * (t + 1);
        void** stack = reinterpret_cast<void**>(end & ~uintptr_t{15});
        *--stack = nullptr;
        *--stack = reinterpret_cast<void*>(run_fiber);
        for (int saved = 0; saved < 6; ++saved) *--stack = nullptr;
        mine.fibers.push_back({stack, false});
    }
    block = &mine;
    emulation_switch(&mine.caller, mine.fibers[0].stack);
    block = nullptr;
}

}  // namespace

void yield() {
    const int from = block->current, threads = static_cast<int>(block->fibers.size());
    if (block->alive == 0) emulation_switch(&block->fibers[from].stack, block->caller);
    int to = from;
    do {
        if (++to == threads) {
            to = 0;
            sched_yield();
        }
    } while (block->fibers[to].done);
    if (to == from) return;
    block->current = to;
    emulation_switch(&block->fibers[from].stack, block->fibers[to].stack);
}

uint64_t* meet_warp(uint64_t value) {
    Warp& warp = block->warps[block->current / 32];
    const unsigned phase = warp.phase;
    uint64_t* values = warp.values[phase & 1];
    values[lane()] = value;
    if (++warp.arrived == 32) {
        warp.arrived = 0;
        ++warp.phase;
    }
    while (warp.phase == phase) yield();
    return values;
}

int meet_block(bool value) {
    Block& mine = *block;
    const unsigned phase = mine.phase;
    if (value) mine.any[phase & 1] = 1;
    if (++mine.arrived == static_cast<int>(mine.fibers.size())) {
        mine.arrived = 0;
        mine.any[(phase + 1) & 1] = 0;
        ++mine.phase;
    }
    while (mine.phase == phase) yield();
    return mine.any[phase & 1];
}

void launch(int blocks, int threads, std::function<void()> body) {
    std::vector<std::thread> running;
    for (int number = 0; number < blocks; ++number)
        running.emplace_back([&body, number, blocks, threads, of = rank] {
            rank = of;
            run_block(number, blocks, threads, body);
        });
    for (std::thread& one : running) one.join();
}

}  // namespace emulation

// What the host code of engines calls. Memory of the GPU is that of the process, and nothing is asynchronous.
cudaError_t cudaMalloc(void** p, size_t bytes) {
    const size_t whole = (bytes + 255) / 256 * 256;
    *p = std::aligned_alloc(256, whole);
    std::memset(*p, 0, whole);
    return cudaSuccess;
}
cudaError_t cudaHostAlloc(void** p, size_t bytes, unsigned) { return cudaMalloc(p, bytes); }
cudaError_t cudaFree(void* p) {
    std::free(p);
    return cudaSuccess;
}
cudaError_t cudaFreeHost(void* p) { return cudaFree(p); }
cudaError_t cudaMemset(void* p, int value, size_t bytes) {
    std::memset(p, value, bytes);
    return cudaSuccess;
}
cudaError_t cudaMemsetAsync(void* p, int value, size_t bytes, cudaStream_t) { return cudaMemset(p, value, bytes); }
cudaError_t cudaMemset2DAsync(void* p, size_t pitch, int value, size_t width, size_t height, cudaStream_t) {
    for (size_t row = 0; row < height; ++row) std::memset(static_cast<char*>(p) + row * pitch, value, width);
    return cudaSuccess;
}
cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind) {
    std::memcpy(to, from, bytes);
    return cudaSuccess;
}
cudaError_t cudaSetDevice(int) { return cudaSuccess; }
cudaError_t cudaDeviceSynchronize() { return cudaSuccess; }
cudaError_t cudaGetLastError() { return cudaSuccess; }
const char* cudaGetErrorString(cudaError_t) { return "an error"; }
