//! Tensor maps as Hopper's copy engine reads them.

use crate::exec::cuda::launch::TensorMap;
use crate::program::DType;
use cudarc::driver::{DriverError, sys};

/// The driver's own form of a tensor map, with lines permuted as kernels/sm90.cuh says. Needs no memory of the device.
pub fn encode(map: &TensorMap) -> Result<[u8; TensorMap::BYTES], DriverError> {
    use sys::CUtensorMapDataType_enum::{
        CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 as BF16, CU_TENSOR_MAP_DATA_TYPE_FLOAT16 as F16,
    };
    let dtype = if map.dtype == DType::BF16 { BF16 } else { F16 };
    let extents = map.extents.map(|n| n as u64);
    let (strides, window, steps) = (map.byte_strides(), map.window.map(|n| n as u32), [1u32; 4]);
    // The driver of CUDA 13 wants more alignment than the binding has.
    #[repr(align(128))]
    struct Aligned(sys::CUtensorMap);
    let mut encoded = Aligned(sys::CUtensorMap { opaque: [0; 16] });
    // SAFETY: the arrays have as many entries as the call reads for four dimensions; it writes one map. The address is only
    // recorded.
    let result = unsafe {
        sys::cuTensorMapEncodeTiled(
            &mut encoded.0,
            dtype,
            extents.len() as u32,
            map.address.0 as *mut std::ffi::c_void,
            extents.as_ptr(),
            strides.as_ptr(),
            window.as_ptr(),
            steps.as_ptr(),
            sys::CUtensorMapInterleave_enum::CU_TENSOR_MAP_INTERLEAVE_NONE,
            sys::CUtensorMapSwizzle_enum::CU_TENSOR_MAP_SWIZZLE_128B,
            sys::CUtensorMapL2promotion_enum::CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
            sys::CUtensorMapFloatOOBfill_enum::CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
        )
    };
    result.result().map(|()| bytemuck::cast(encoded.0.opaque))
}
