// What the CUDA kernels offer: a C interface without PyTorch, so that nvcc compiles it anywhere. Pointers are of the
// device, whose current stream is given; memory to work in comes from the caller. Nothing waits for the device. Every
// function returns CUDA's error code, 0 if there is none.
#pragma once

#include "../arguments.h"

extern "C" {

int64_t gengram_cuda_plan_bytes(int64_t batch, int64_t tokens);
int gengram_cuda_plan(const int64_t* codes, const int32_t* behind, int64_t batch, int64_t tokens, int largest, int32_t* grams,
                      int32_t* runs, void* workspace, void* stream);

int64_t gengram_cuda_forward_bytes(const gengram::ForwardArguments* a);
int gengram_cuda_forward(const gengram::ForwardArguments* a, void* workspace, void* stream);

// The rows that gradients are added to: the caller sorts `keys` (gengram_cuda_row_entries of them), stably, and gives the
// sorted keys and their places to gengram_cuda_backward. Only with tables, whose rows must be float32.
int64_t gengram_cuda_row_entries(const gengram::BackwardArguments* a);
int gengram_cuda_row_keys(const gengram::BackwardArguments* a, int32_t* keys, void* stream);
int64_t gengram_cuda_backward_bytes(const gengram::BackwardArguments* a);
int gengram_cuda_backward(const gengram::BackwardArguments* a, const int32_t* sorted_keys, const int64_t* order, void* workspace,
                          void* stream);

int gengram_cuda_features(const gengram::FeatureArguments* a, void* stream);

// Likewise for one table after the other: batch * tokens keys of each.
int gengram_cuda_table_keys(const gengram::FeatureArguments* a, int64_t table, int32_t* keys, void* stream);
int64_t gengram_cuda_features_backward_bytes(const gengram::FeatureArguments* a);
int gengram_cuda_features_backward(const gengram::FeatureArguments* a, int64_t table, const int32_t* sorted_keys,
                                   const int64_t* order, void* workspace, void* stream);
}
