/* See device.c. Functions whose arguments do not matter here; without their headers, so with none of their types. */

#include <stdlib.h>
#include <string.h>

void hollow_count(int kind, const char *what);

#define KERNEL(name)                                                                                                   \
    int name(void)                                                                                                     \
    {                                                                                                                  \
        hollow_count(0, #name);                                                                                        \
        return 0;                                                                                                      \
    }
#define NOTHING(name)                                                                                                  \
    int name(void) { return 0; }

KERNEL(cudaLaunchCooperativeKernel)
KERNEL(cublasGemmEx)
KERNEL(cublasGemmStridedBatchedEx)
KERNEL(cublasSgemm_v2)
KERNEL(cublasSgemmEx)
KERNEL(cublasSgemmStridedBatched)
KERNEL(cublasDgemm_v2)
KERNEL(cublasDgemmStridedBatched)
KERNEL(cublasSgemv_v2)
KERNEL(cublasDgemv_v2)
KERNEL(cublasSdot_v2)
KERNEL(cublasDdot_v2)
KERNEL(cublasDotEx)
KERNEL(cublasLtMatmul)
KERNEL(cudnnConvolutionForward)
KERNEL(cudnnConvolutionBackwardData)
KERNEL(cudnnConvolutionBackwardFilter)
KERNEL(cudnnConvolutionBiasActivationForward)
KERNEL(cudnnBatchNormalizationForwardTrainingEx)
KERNEL(cudnnBatchNormalizationForwardInference)
KERNEL(cudnnBatchNormalizationBackwardEx)
KERNEL(cudnnPoolingForward)
KERNEL(ncclAllGather)
KERNEL(ncclAllReduce)
KERNEL(ncclBcast)
KERNEL(ncclBroadcast)
KERNEL(ncclReduce)
KERNEL(ncclReduceScatter)
KERNEL(ncclSend)
KERNEL(ncclRecv)
KERNEL(ncclAlltoAll)
NOTHING(ncclCommAbort)
NOTHING(ncclCommDestroy)
NOTHING(ncclCommFinalize)
NOTHING(ncclCommRegister)
NOTHING(ncclCommDeregister)
NOTHING(ncclGetUniqueId)
NOTHING(ncclGroupEnd)
NOTHING(ncclGroupStart)
NOTHING(cudaHostRegister)
NOTHING(cudaHostUnregister)
NOTHING(cublasDestroy_v2)
NOTHING(cublasSetMathMode)
NOTHING(cublasSetPointerMode_v2)
NOTHING(cublasSetStream_v2)
NOTHING(cublasSetWorkspace_v2)
NOTHING(cudnnDestroy)
NOTHING(cudnnSetStream)
NOTHING(cuCtxGetCurrent)
NOTHING(cuCtxSetCurrent)
NOTHING(cuDeviceGet)
NOTHING(cuDeviceGetAttribute)
NOTHING(cuDevicePrimaryCtxRetain)
NOTHING(cuFuncGetAttribute)
NOTHING(cuFuncSetAttribute)
NOTHING(cuFuncSetCacheConfig)
NOTHING(cuGetErrorString)
NOTHING(cuLaunchCooperativeKernel)
NOTHING(cuLaunchKernel)
NOTHING(cuLinkAddData_v2)
NOTHING(cuLinkComplete)
NOTHING(cuLinkCreate_v2)
NOTHING(cuModuleGetFunction)
NOTHING(cuModuleLoad)
NOTHING(cuModuleLoadData)
NOTHING(cuModuleLoadDataEx)
NOTHING(cuModuleUnload)
NOTHING(cuOccupancyMaxActiveBlocksPerMultiprocessor)
NOTHING(cuPointerGetAttribute)
NOTHING(cuTensorMapEncodeTiled)

/* Handles and settings of cuBLAS and cuDNN. */

static int made(void **to) { return *to = malloc(1), 0; }
int cublasCreate_v2(void **to) { return made(to); }
int cudnnCreate(void **to) { return made(to); }
int cublasGetMathMode(void *of, int *mode) { return *mode = 0, 0; }
int cublasGetPointerMode_v2(void *of, int *mode) { return *mode = 0, 0; }
int cudnnGetStream(void *of, void **stream) { return *stream = NULL, 0; }

/* One way for each product and each convolution: its number is 1, and it takes no memory to work in. */

int cublasLtMatmulAlgoGetHeuristic(
    void *of, void *product, void *a, void *b, void *c, void *d, void *preference, int wanted, void *found, int *num_found)
{
    memset(found, 0, 96); /* cublasLtMatmulHeuristicResult_t */
    return *num_found = 1, 0;
}

struct algorithm { /* cudnnConvolutionFwdAlgoPerf_t and its like */
    int algorithm, status;
    float milliseconds;
    size_t memory;
    int is_deterministic, math, reserved[3];
};

#define ALGORITHM(name)                                                                                                \
    int name(void *of, void *a, void *b, void *how, void *c, int wanted, int *num_found, struct algorithm *found)      \
    {                                                                                                                  \
        *found = (struct algorithm){.algorithm = 1, .is_deterministic = 1};                                            \
        return *num_found = 1, 0;                                                                                      \
    }
ALGORITHM(cudnnGetConvolutionForwardAlgorithm_v7)
ALGORITHM(cudnnGetConvolutionBackwardDataAlgorithm_v7)
ALGORITHM(cudnnGetConvolutionBackwardFilterAlgorithm_v7)

#define WORKSPACE(name)                                                                                                \
    int name(void *of, void *a, void *b, void *how, void *c, int algorithm, size_t *size) { return *size = 0, 0; }
WORKSPACE(cudnnGetConvolutionForwardWorkspaceSize)
WORKSPACE(cudnnGetConvolutionBackwardDataWorkspaceSize)
WORKSPACE(cudnnGetConvolutionBackwardFilterWorkspaceSize)

int cudnnGetBatchNormalizationForwardTrainingExWorkspaceSize(
    void *of, int mode, int ops, void *a, void *b, void *c, void *d, void *e, size_t *size)
{
    return *size = 0, 0;
}

int cudnnGetBatchNormalizationBackwardExWorkspaceSize(
    void *of, int mode, int ops, void *a, void *b, void *c, void *d, void *e, void *f, void *g, size_t *size)
{
    return *size = 0, 0;
}

int cudnnGetBatchNormalizationTrainingExReserveSpaceSize(void *of, int mode, int ops, void *a, void *b, size_t *size)
{
    return *size = 0, 0;
}

int cudaStreamGetCaptureInfo(void *stream, int *status) /* and where more is to be written, which nothing is read of */
{
    return *status = 0, 0;
}

#define FOUND_ALGORITHM(name)                                                                                          \
    int name(                                                                                                          \
        void *of, void *a, void *b, void *c, void *d, void *how, void *e, void *f, int wanted, int *num_found,         \
        struct algorithm *found, void *workspace, size_t size)                                                         \
    {                                                                                                                  \
        *found = (struct algorithm){.algorithm = 1, .is_deterministic = 1};                                            \
        return *num_found = 1, 0;                                                                                      \
    }
FOUND_ALGORITHM(cudnnFindConvolutionForwardAlgorithmEx)
FOUND_ALGORITHM(cudnnFindConvolutionBackwardDataAlgorithmEx)
FOUND_ALGORITHM(cudnnFindConvolutionBackwardFilterAlgorithmEx)

/* NCCL: nothing is sent. */

struct id { /* ncclUniqueId, which comes by value */
    char bytes[128];
};
struct group {
    int size, rank;
};

static int joined(struct group **to, int size, int rank)
{
    *to = malloc(sizeof **to);
    (*to)->size = size, (*to)->rank = rank;
    return 0;
}

int ncclCommInitRank(struct group **to, int size, struct id id, int rank) { return joined(to, size, rank); }
int ncclCommInitRankConfig(struct group **to, int size, struct id id, int rank) { return joined(to, size, rank); }
int ncclCommInitRankScalable(struct group **to, int size, int rank) { return joined(to, size, rank); }
int ncclCommInitAll(struct group **to, int size)
{
    for (int rank = 0; rank < size; rank++)
        joined(to + rank, size, rank);
    return 0;
}
int ncclCommGetAsyncError(void *of, int *error) { return *error = 0, 0; }
int ncclCommCount(struct group *of, int *num) { return *num = of->size, 0; }
int ncclCommUserRank(struct group *of, int *rank) { return *rank = of->rank, 0; }
int ncclCommCuDevice(struct group *of, int *device) { return *device = of->rank, 0; }
