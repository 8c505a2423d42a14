// How fast pages of a file get to a GPU, without any of this library: what its staging is measured against.
//
//   nvcc -O2 -o bus benches/bus.cu -lpthread && ./bus FILE        # FILE warm, several GB
//
// 1. Copies from locked memory, by size. 2. The same while threads read the file into memory of their own. 3. Threads that read
// pieces of the file into locked memory and copy them, each with one, two or four pieces of its own.

#include <cuda_runtime.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <thread>
#include <vector>

using Clock = std::chrono::steady_clock;

const size_t MiB = 1 << 20, RING = 256 * MiB, DEVICE = 4096 * MiB, HUGE_PAGE = 2 * MiB;

double since(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }

void must(bool ok, const char* what) {
    if (!ok) {
        fprintf(stderr, "error: %s\n", what);
        exit(1);
    }
}

void check(cudaError_t error) { must(error == cudaSuccess, cudaGetErrorString(error)); }

void read_all(int file, char* to, size_t len, off_t at) {
    for (size_t done = 0; done < len;) {
        ssize_t got = pread(file, to + done, len - done, at + done);
        must(got > 0, "the file cannot be read");
        done += got;
    }
}

struct Bed {
    int file;
    size_t file_bytes;
    char *ring, *device;
    cudaStream_t stream;

    void copy(size_t at, const char* from, size_t len) {
        check(cudaMemcpyAsync(device + at % DEVICE, from, len, cudaMemcpyHostToDevice, stream));
    }
};

double copies(Bed& bed, size_t piece, size_t total) {
    auto start = Clock::now();
    for (size_t at = 0; at < total; at += piece) bed.copy(at, bed.ring + at % RING, piece);
    check(cudaStreamSynchronize(bed.stream));
    return total / since(start) / 1e9;
}

void beside_readers(Bed& bed, int readers) {
    std::atomic<bool> stop{false};
    std::atomic<size_t> bytes{0};
    std::vector<std::thread> threads;
    for (int reader = 0; reader < readers; reader++)
        threads.emplace_back([&, reader] {
            std::vector<char> own(MiB);
            for (size_t at = reader * (bed.file_bytes / readers) / MiB * MiB; !stop; at += MiB) {
                if (at + MiB > bed.file_bytes) at = 0;
                read_all(bed.file, own.data(), MiB, at);
                bytes += MiB;
            }
        });
    usleep(20'000);
    bytes = 0;
    auto start = Clock::now();
    double rate = copies(bed, 4 * MiB, 16'384 * MiB);
    double read = bytes / since(start) / 1e9;
    stop = true;
    for (auto& thread : threads) thread.join();
    printf("copies of 4 MiB beside %2d readers: %.1f GB/s, readers %.1f GB/s\n", readers, rate, read);
}

void pipeline(Bed& bed, size_t threads, size_t depth, size_t piece) {
    if (threads * depth * piece > RING) return;
    size_t total = std::min(bed.file_bytes, 12'288 * MiB) / piece * piece;
    std::atomic<size_t> next{0};
    std::vector<std::thread> pool;
    auto start = Clock::now();
    for (size_t thread = 0; thread < threads; thread++)
        pool.emplace_back([&, thread] {
            std::vector<cudaEvent_t> ended(depth);
            for (auto& event : ended) check(cudaEventCreateWithFlags(&event, cudaEventDisableTiming | cudaEventBlockingSync));
            for (size_t number = 0;; number++) {
                size_t at = next.fetch_add(piece), slot = number % depth;
                if (at >= total) break;
                char* here = bed.ring + (thread * depth + slot) * piece;
                // An event that was never recorded has ended.
                check(cudaEventSynchronize(ended[slot]));
                read_all(bed.file, here, piece, at);
                bed.copy(at, here, piece);
                check(cudaEventRecord(ended[slot], bed.stream));
            }
            for (auto& event : ended) {
                check(cudaEventSynchronize(event));
                check(cudaEventDestroy(event));
            }
        });
    for (auto& thread : pool) thread.join();
    printf("%2zu threads, each with %zu of %zu MiB: %.1f GB/s\n", threads, depth, piece / MiB, total / since(start) / 1e9);
}

int main(int count, char** words) {
    must(count == 2, "usage: bus FILE");
    Bed bed;
    bed.file = open(words[1], O_RDONLY);
    must(bed.file >= 0, "the file cannot be opened");
    bed.file_bytes = lseek(bed.file, 0, SEEK_END);
    must(bed.file_bytes >= 64 * MiB, "the file is too small");
    void* mapped = mmap(nullptr, RING + HUGE_PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    must(mapped != MAP_FAILED, "no memory");
    bed.ring = reinterpret_cast<char*>((reinterpret_cast<size_t>(mapped) + HUGE_PAGE - 1) / HUGE_PAGE * HUGE_PAGE);
    madvise(bed.ring, RING, MADV_HUGEPAGE);
    memset(bed.ring, 1, RING);
    check(cudaHostRegister(bed.ring, RING, cudaHostRegisterPortable));
    check(cudaMalloc(&bed.device, DEVICE));
    check(cudaStreamCreateWithFlags(&bed.stream, cudaStreamNonBlocking));
    for (size_t piece : {MiB / 4, MiB, 4 * MiB, 16 * MiB})
        printf("copies of %5zu KiB: %.1f GB/s\n", piece >> 10, copies(bed, piece, 8192 * MiB));
    for (int readers : {4, 8, 16}) beside_readers(bed, readers);
    for (size_t threads : {8, 12, 16, 24})
        for (size_t depth : {1, 2, 4})
            for (size_t piece : {MiB, 4 * MiB}) pipeline(bed, threads, depth, piece);
}
