// What our operators need of torch where a library that torch's compiler made calls them: C functions that take handles of
// tensors, and which torch exports (torch/csrc/inductor/aoti_torch/c/shim.h).
#pragma once

#include <cstdint>

extern "C" {

int32_t aoti_torch_device_type_cpu();
int32_t aoti_torch_dtype_bfloat16();
int32_t aoti_torch_dtype_float16();
int32_t aoti_torch_dtype_float32();
int32_t aoti_torch_dtype_int8();
int32_t aoti_torch_get_data_ptr(void* tensor, void** pointer);
int32_t aoti_torch_get_dtype(void* tensor, int32_t* dtype);
int32_t aoti_torch_get_dim(void* tensor, int64_t* count);
int32_t aoti_torch_get_numel(void* tensor, int64_t* count);
int32_t aoti_torch_get_sizes(void* tensor, int64_t** sizes);
int32_t aoti_torch_get_strides(void* tensor, int64_t** strides);
int32_t aoti_torch_empty_strided(int64_t dims, const int64_t* sizes, const int64_t* strides, int32_t dtype,
                                 int32_t device_type, int32_t device_index, void** tensor);
}
