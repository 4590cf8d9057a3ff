/* A GPU that computes nothing: loaded before CUDA's runtime, cuBLAS, cuDNN and the driver, it answers for them.
 *
 * There is one device, or as many as HOLLOW_GPUS says. Its memory is addresses without anything behind them, so whoever
 * reads it on the host ends by a segmentation fault, as with a real one; no more of it is given than it has. What is copied
 * from it to the host is zeros, but a single byte, which is a truth value, is true; a kernel is counted and not run.
 * All else is PyTorch's own: which device an operator refuses, what is copied, and where the host waits.
 */
#define _GNU_SOURCE
#include <cuda.h>
#include <cuda_runtime_api.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

/* What is counted. */

enum { KERNEL, WAIT, TO_DEVICE, TO_HOST, WITHIN, NUM_KINDS };
static void (*report)(int kind, const char *what);

void hollow_report_to(void (*callback)(int, const char *)) { report = callback; }

void hollow_count(int kind, const char *what)
{
    if (report)
        report(kind, what);
}

/* Memory. */

#define MOST_GPUS 8
#define ROOM (1ull << 43) /* addresses of a device, not bytes: 8 TiB, of which no address is given twice */
#define TOTAL (141ull << 30)
#define BLOCK (2ull << 20)
static char *memory;
static int num_gpus = 1;
static _Thread_local int current;
static _Atomic size_t given[MOST_GPUS], used[MOST_GPUS];
static uint32_t blocks[MOST_GPUS * (ROOM / BLOCK)]; /* how many there are of what begins at each */

static int is_on_device(const void *address)
{
    return (const char *)address >= memory && (const char *)address < memory + MOST_GPUS * ROOM;
}

__attribute__((constructor)) static void reserve(void)
{
    if (getenv("HOLLOW_GPUS"))
        num_gpus = atoi(getenv("HOLLOW_GPUS"));
    memory = mmap(NULL, MOST_GPUS * ROOM, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED || num_gpus > MOST_GPUS)
        abort();
}

cudaError_t cudaMalloc(void **to, size_t size)
{
    size = (size + BLOCK - 1) & ~(BLOCK - 1);
    if (atomic_fetch_add(&used[current], size) + size > TOTAL || given[current] + size > ROOM) {
        used[current] -= size;
        return cudaErrorMemoryAllocation;
    }
    *to = memory + current * ROOM + atomic_fetch_add(&given[current], size);
    blocks[((char *)*to - memory) / BLOCK] = size / BLOCK;
    return cudaSuccess;
}

cudaError_t cudaFree(void *address)
{
    if (address) {
        size_t place = (char *)address - memory;
        used[place / ROOM] -= blocks[place / BLOCK] * BLOCK;
    }
    return cudaSuccess;
}

cudaError_t cudaMemGetInfo(size_t *available, size_t *total)
{
    *total = TOTAL, *available = TOTAL - used[current];
    return cudaSuccess;
}

#define PINNED 4096
static struct { char *begin; size_t size; } pinned[PINNED];
static _Atomic int num_pinned;

static int is_pinned(const void *address)
{
    for (int i = 0; i < num_pinned && i < PINNED; i++)
        if ((char *)address >= pinned[i].begin && (char *)address < pinned[i].begin + pinned[i].size)
            return 1;
    return 0;
}

cudaError_t cudaHostAlloc(void **to, size_t size, unsigned flags)
{
    int i = num_pinned++;
    if (i >= PINNED || !(*to = calloc(1, size ? size : 1)))
        return cudaErrorMemoryAllocation;
    pinned[i].begin = *to, pinned[i].size = size;
    return cudaSuccess;
}

cudaError_t cudaFreeHost(void *address) { return cudaSuccess; } /* kept: a list that grows only needs no lock */

cudaError_t cudaPointerGetAttributes(struct cudaPointerAttributes *found, const void *address)
{
    memset(found, 0, sizeof *found);
    found->type = is_on_device(address) ? cudaMemoryTypeDevice
                  : is_pinned(address)  ? cudaMemoryTypeHost
                                        : cudaMemoryTypeUnregistered;
    found->device = is_on_device(address) ? ((char *)address - memory) / ROOM : 0;
    found->devicePointer = found->hostPointer = (void *)address;
    return cudaSuccess;
}

static void copy(void *to, const void *from, size_t size, int is_async)
{
    int there = is_on_device(to), here = !is_on_device(from);
    hollow_count(there && here ? TO_DEVICE : there ? WITHIN : TO_HOST, is_async ? "cudaMemcpyAsync" : "cudaMemcpy");
    if (there != !here && (!is_async || !is_pinned(there ? from : to))) /* CUDA cannot copy these beside the host */
        hollow_count(WAIT, "a copy of pageable memory");
    if (!there && !here)
        memset(to, size == 1, size);
    else if (!there)
        memmove(to, from, size);
}

cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t size, enum cudaMemcpyKind kind, cudaStream_t stream)
{
    copy(to, from, size, 1);
    return cudaSuccess;
}

cudaError_t cudaMemcpy(void *to, const void *from, size_t size, enum cudaMemcpyKind kind)
{
    copy(to, from, size, 0);
    return cudaSuccess;
}

cudaError_t cudaMemset(void *to, int value, size_t size)
{
    hollow_count(KERNEL, "cudaMemset");
    return cudaSuccess;
}

cudaError_t cudaMemsetAsync(void *to, int value, size_t size, cudaStream_t stream)
{
    hollow_count(KERNEL, "cudaMemsetAsync");
    return cudaSuccess;
}

/* The device. */

cudaError_t cudaGetDeviceCount(int *found) { return *found = num_gpus, cudaSuccess; }
cudaError_t cudaGetDevice(int *found) { return *found = current, cudaSuccess; }
cudaError_t cudaSetDevice(int device)
{
    return device < 0 || device >= num_gpus ? cudaErrorInvalidDevice : (current = device, cudaSuccess);
}
cudaError_t cudaDriverGetVersion(int *found) { return *found = CUDART_VERSION, cudaSuccess; }
cudaError_t cudaDeviceCanAccessPeer(int *found, int one, int other) { return *found = 0, cudaSuccess; }
cudaError_t cudaGetLastError(void) { return cudaSuccess; }
cudaError_t cudaPeekAtLastError(void) { return cudaSuccess; }

cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp *found, int device)
{
    memset(found, 0, sizeof *found);
    strcpy(found->name, "Hollow");
    found->major = 9, found->warpSize = 32, found->multiProcessorCount = 132;
    found->totalGlobalMem = TOTAL, found->l2CacheSize = 50 << 20;
    found->maxThreadsPerBlock = 1024, found->maxThreadsPerMultiProcessor = 2048, found->regsPerMultiprocessor = 65536;
    found->sharedMemPerBlock = 49152, found->sharedMemPerMultiprocessor = 233472, found->sharedMemPerBlockOptin = 232448;
    for (int i = 0; i < 3; i++)
        found->maxGridSize[i] = i ? 65535 : 0x7fffffff, found->maxThreadsDim[i] = i < 2 ? 1024 : 64;
    return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int *found, enum cudaDeviceAttr which, int device)
{
    switch (which) {
    case cudaDevAttrComputeCapabilityMajor: *found = 9; break;
    case cudaDevAttrMultiProcessorCount: *found = 132; break;
    case cudaDevAttrMaxThreadsPerBlock: *found = 1024; break;
    case cudaDevAttrMaxThreadsPerMultiProcessor: *found = 2048; break;
    case cudaDevAttrMaxRegistersPerBlock: *found = 65536; break;
    case cudaDevAttrMaxSharedMemoryPerBlock: *found = 49152; break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *found = 232448; break;
    case cudaDevAttrMaxGridDimX: *found = 0x7fffffff; break;
    case cudaDevAttrWarpSize: *found = 32; break;
    default: *found = 0;
    }
    return cudaSuccess;
}

cudaError_t cudaDeviceGetStreamPriorityRange(int *least, int *greatest) { return *least = *greatest = 0, cudaSuccess; }

cudaError_t cudaGetDriverEntryPointByVersion(
    const char *name, void **found, unsigned version, unsigned long long flags, enum cudaDriverEntryPointQueryResult *how)
{
    *found = NULL;
    if (how)
        *how = cudaDriverEntryPointSymbolNotFound;
    return cudaSuccess;
}

CUresult cuDevicePrimaryCtxGetState(CUdevice device, unsigned *flags, int *is_active)
{
    return *flags = 0, *is_active = 1, CUDA_SUCCESS;
}

/* Kernels. */

cudaError_t cudaLaunchKernel(const void *kernel, dim3 grid, dim3 block, void **args, size_t shared, cudaStream_t stream)
{
    hollow_count(KERNEL, "cudaLaunchKernel");
    return cudaSuccess;
}

cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void **args, size_t shared, cudaStream_t stream)
{
    hollow_count(KERNEL, "cudaLaunchKernel");
    return cudaSuccess;
}

cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t *config, const void *kernel, void **args)
{
    hollow_count(KERNEL, "cudaLaunchKernel");
    return cudaSuccess;
}

cudaError_t __cudaGetKernel(cudaKernel_t *found, const void *kernel) { return *found = (cudaKernel_t)kernel, cudaSuccess; }
cudaError_t cudaFuncSetAttribute(const void *kernel, enum cudaFuncAttribute which, int value) { return cudaSuccess; }

cudaError_t cudaFuncGetAttributes(struct cudaFuncAttributes *found, const void *kernel)
{
    memset(found, 0, sizeof *found);
    found->ptxVersion = found->binaryVersion = 90, found->maxThreadsPerBlock = 1024, found->numRegs = 32;
    return cudaSuccess;
}

cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(
    int *found, const void *kernel, int threads, size_t shared, unsigned flags)
{
    return *found = 2, cudaSuccess;
}

/* Streams and events: all that they are given is done at once. */

static void *handle(void) { return malloc(1); }

cudaError_t cudaStreamCreate(cudaStream_t *to) { return *to = handle(), cudaSuccess; }
cudaError_t cudaStreamCreateWithFlags(cudaStream_t *to, unsigned flags) { return *to = handle(), cudaSuccess; }
cudaError_t cudaStreamCreateWithPriority(cudaStream_t *to, unsigned flags, int priority) { return *to = handle(), cudaSuccess; }
cudaError_t cudaStreamDestroy(cudaStream_t stream) { return cudaSuccess; }
cudaError_t cudaStreamQuery(cudaStream_t stream) { return cudaSuccess; }
cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned flags) { return cudaSuccess; }
cudaError_t cudaStreamGetPriority(cudaStream_t stream, int *found) { return *found = 0, cudaSuccess; }
cudaError_t cudaStreamIsCapturing(cudaStream_t stream, enum cudaStreamCaptureStatus *found)
{
    return *found = cudaStreamCaptureStatusNone, cudaSuccess;
}
cudaError_t cudaThreadExchangeStreamCaptureMode(enum cudaStreamCaptureMode *mode) { return cudaSuccess; }
cudaError_t cudaEventCreate(cudaEvent_t *to) { return *to = handle(), cudaSuccess; }
cudaError_t cudaEventCreateWithFlags(cudaEvent_t *to, unsigned flags) { return *to = handle(), cudaSuccess; }
cudaError_t cudaEventDestroy(cudaEvent_t event) { return cudaSuccess; }
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) { return cudaSuccess; }
cudaError_t cudaEventRecordWithFlags(cudaEvent_t event, cudaStream_t stream, unsigned flags) { return cudaSuccess; }
cudaError_t cudaEventQuery(cudaEvent_t event) { return cudaSuccess; }
cudaError_t cudaEventElapsedTime(float *found, cudaEvent_t from, cudaEvent_t to) { return *found = 1, cudaSuccess; }

cudaError_t cudaStreamSynchronize(cudaStream_t stream) { return hollow_count(WAIT, "cudaStreamSynchronize"), cudaSuccess; }
cudaError_t cudaDeviceSynchronize(void) { return hollow_count(WAIT, "cudaDeviceSynchronize"), cudaSuccess; }
cudaError_t cudaEventSynchronize(cudaEvent_t event) { return hollow_count(WAIT, "cudaEventSynchronize"), cudaSuccess; }
