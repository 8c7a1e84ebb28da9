// What XLA calls: the native bodies as custom calls of its foreign function interface.

#include "product.h"
#include "xla/ffi/api/ffi.h"

namespace specformer {
namespace {

namespace ffi = xla::ffi;
using Bf16Matrix = ffi::BufferR2<ffi::BF16>;

ffi::Error packed_product(Bf16Matrix x, ffi::BufferR4<ffi::BF16> weights, ffi::ResultBufferR2<ffi::BF16> out) {
  const int64_t rows = x.dimensions()[0], inputs = x.dimensions()[1], columns = out->dimensions()[1];
  const auto packed = weights.dimensions();
  if (packed[0] != (columns + 15) / 16 || packed[1] != (inputs + 1) / 2 || packed[2] != 16 || packed[3] != 2) {
    return ffi::Error::InvalidArgument("the weights are packed for another product");
  }
  product(reinterpret_cast<const uint16_t*>(x.typed_data()), rows, inputs,
          reinterpret_cast<const uint32_t*>(weights.typed_data()), columns,
          reinterpret_cast<uint16_t*>(out->typed_data()));
  return ffi::Error::Success();
}

ffi::Error rows_product(Bf16Matrix x, Bf16Matrix stored, ffi::ResultBufferR2<ffi::F32> out) {
  product_of_rows(reinterpret_cast<const uint16_t*>(x.typed_data()), x.dimensions()[0], x.dimensions()[1],
                  reinterpret_cast<const uint16_t*>(stored.typed_data()), stored.dimensions()[0], out->typed_data());
  return ffi::Error::Success();
}

}  // namespace
}  // namespace specformer

#define HANDLER extern "C" __attribute__((visibility("default"))) XLA_FFI_Error*
HANDLER specformer_product(XLA_FFI_CallFrame*);
HANDLER specformer_product_of_rows(XLA_FFI_CallFrame*);

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    specformer_product, specformer::packed_product,
    xla::ffi::Ffi::Bind()
        .Arg<xla::ffi::BufferR2<xla::ffi::BF16>>()
        .Arg<xla::ffi::BufferR4<xla::ffi::BF16>>()
        .Ret<xla::ffi::BufferR2<xla::ffi::BF16>>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    specformer_product_of_rows, specformer::rows_product,
    xla::ffi::Ffi::Bind()
        .Arg<xla::ffi::BufferR2<xla::ffi::BF16>>()
        .Arg<xla::ffi::BufferR2<xla::ffi::BF16>>()
        .Ret<xla::ffi::BufferR2<xla::ffi::F32>>());
