// What XLA calls: the native bodies as custom calls of its foreign function interface.

#include <utility>

#include "attention/attention.h"
#include "norm/norm.h"
#include "product/product.h"
#include "rotary/rotary.h"
#include "sampling/sampling.h"
#include "swiglu/swiglu.h"
#include "xla/ffi/api/ffi.h"

namespace specformer {
namespace {

namespace ffi = xla::ffi;
using Bf16Matrix = ffi::BufferR2<ffi::BF16>;
using Integers = ffi::BufferR1<ffi::S32>;

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

ffi::Error product_by_records(Bf16Matrix x, ffi::BufferR3<ffi::U8> weights, ffi::ResultBufferR2<ffi::BF16> out) {
  const int64_t rows = x.dimensions()[0], inputs = x.dimensions()[1], columns = out->dimensions()[1];
  const auto packed = weights.dimensions();
  if (packed[0] != (columns + 15) / 16 || packed[1] * 32 != inputs || packed[2] != sizeof(Record)) {
    return ffi::Error::InvalidArgument("the weights are packed for another product");
  }
  four_bit_product(reinterpret_cast<const uint16_t*>(x.typed_data()), rows, inputs,
                   reinterpret_cast<const Record*>(weights.typed_data()), columns,
                   reinterpret_cast<uint16_t*>(out->typed_data()));
  return ffi::Error::Success();
}

ffi::Error rows_product(Bf16Matrix x, Bf16Matrix stored, ffi::ResultBufferR2<ffi::F32> out) {
  product_of_rows(reinterpret_cast<const uint16_t*>(x.typed_data()), x.dimensions()[0], x.dimensions()[1],
                  reinterpret_cast<const uint16_t*>(stored.typed_data()), stored.dimensions()[0], out->typed_data());
  return ffi::Error::Success();
}

ffi::Error norm(ffi::AnyBuffer x, ffi::AnyBuffer scale, ffi::Result<ffi::AnyBuffer> out, float epsilon) {
  const auto shape = x.dimensions(), scales = scale.dimensions();
  const bool fit = shape.size() == 2 && out->dimensions() == shape && scales.size() == 2 && scales[1] == shape[1] &&
                   scales[0] > 0 && shape[0] % scales[0] == 0;
  if (!fit) return ffi::Error::InvalidArgument("the shapes of a norm's arguments do not fit each other");
  if (scale.element_type() != x.element_type() || out->element_type() != x.element_type()) {
    return ffi::Error::InvalidArgument("a norm has one type");
  }
  const auto run = [&](auto type) {
    using T = decltype(type);
    rms_norm(static_cast<const T*>(x.untyped_data()), shape[0], shape[1], static_cast<const T*>(scale.untyped_data()),
             scales[0], epsilon, static_cast<T*>(out->untyped_data()));
    return ffi::Error::Success();
  };
  switch (x.element_type()) {
    case ffi::F32: return run(float{});
    case ffi::BF16: return run(uint16_t{});
    default: return ffi::Error::InvalidArgument("a norm is of float32 or bfloat16");
  }
}

ffi::Error gated(ffi::BufferR3<ffi::BF16> gate_up, ffi::ResultBufferR2<ffi::BF16> out) {
  const auto given = gate_up.dimensions(), shape = out->dimensions();
  if (given[0] != shape[0] || given[1] != 2 || given[2] != shape[1]) {
    return ffi::Error::InvalidArgument("the shapes of a SwiGLU's arguments do not fit each other");
  }
  swiglu(reinterpret_cast<const uint16_t*>(gate_up.typed_data()), shape[0], shape[1],
         reinterpret_cast<uint16_t*>(out->typed_data()));
  return ffi::Error::Success();
}

using Bf16Heads = ffi::ResultBufferR3<ffi::BF16>;

ffi::Error rotated(ffi::BufferR4<ffi::BF16> qkv, ffi::BufferR2<ffi::F32> cos, ffi::BufferR2<ffi::F32> sin, Bf16Heads q,
                   Bf16Heads k, Bf16Heads v) {
  const auto given = qkv.dimensions(), queries = q->dimensions(), keys = k->dimensions(), angles = cos.dimensions();
  const bool fit = given[2] > 2 && given[3] % 2 == 0 && queries[0] == given[0] && queries[2] == given[3] &&
                   queries[1] == given[1] * (given[2] - 2) && keys[0] == given[0] && keys[1] == given[1] &&
                   keys[2] == given[3] && v->dimensions() == keys && angles[0] == given[0] &&
                   angles[1] == given[3] / 2 && sin.dimensions() == angles;
  if (!fit) return ffi::Error::InvalidArgument("the shapes of a rotation's arguments do not fit each other");
  const auto data = [](auto& buffer) { return reinterpret_cast<uint16_t*>(buffer->typed_data()); };
  split_and_rotate({given[0], given[1], given[2] - 2, given[3], reinterpret_cast<const uint16_t*>(qkv.typed_data()),
                    cos.typed_data(), sin.typed_data(), data(q), data(k), data(v)});
  return ffi::Error::Success();
}

using Floats = ffi::ResultBufferR1<ffi::F32>;

// What both forms of sampling share; `columns` is the size of the vocabulary.
ffi::Error sampling_of(int64_t rows, int64_t columns, ffi::BufferR2<ffi::U32> keys, ffi::BufferR2<ffi::F32> how,
                       Integers tokens, bool softmax, Floats score, ffi::ResultBufferR1<ffi::S32> column, Floats top,
                       Floats mass, Sampling& call) {
  const auto per_row = [&](auto dimensions) { return dimensions[0] == rows && dimensions[1] == 2; };
  const bool fit = per_row(keys.dimensions()) && per_row(how.dimensions()) && tokens.dimensions()[0] == columns &&
                   score->dimensions()[0] == rows && column->dimensions()[0] == rows && top->dimensions()[0] == rows &&
                   mass->dimensions()[0] == rows;
  if (!fit) return ffi::Error::InvalidArgument("the shapes of a sampling's arguments do not fit each other");
  call = {rows, columns, keys.typed_data(), how.typed_data(), tokens.typed_data(), softmax,
          score->typed_data(), column->typed_data(), top->typed_data(), mass->typed_data()};
  return ffi::Error::Success();
}

ffi::Error sampled_logits(ffi::BufferR2<ffi::F32> logits, ffi::BufferR2<ffi::U32> keys, ffi::BufferR2<ffi::F32> how,
                          Integers tokens, Floats score, ffi::ResultBufferR1<ffi::S32> column, Floats top, Floats mass,
                          bool softmax) {
  const auto shape = logits.dimensions();
  Sampling call;
  ffi::Error error =
      sampling_of(shape[0], shape[1], keys, how, tokens, softmax, score, column, top, mass, call);
  if (error.success()) best_of_logits(call, logits.typed_data());
  return error;
}

ffi::Error sampled_hidden(Bf16Matrix hidden, Bf16Matrix lm_head, ffi::BufferR2<ffi::U32> keys,
                          ffi::BufferR2<ffi::F32> how, Integers tokens, Floats score,
                          ffi::ResultBufferR1<ffi::S32> column, Floats top, Floats mass, bool softmax) {
  const auto shape = hidden.dimensions(), head = lm_head.dimensions();
  if (head[1] != shape[1]) return ffi::Error::InvalidArgument("an LM head of another width");
  Sampling call;
  ffi::Error error = sampling_of(shape[0], head[0], keys, how, tokens, softmax, score, column, top, mass, call);
  if (error.success()) {
    best_of_hidden(call, reinterpret_cast<const uint16_t*>(hidden.typed_data()), shape[1],
                   reinterpret_cast<const uint16_t*>(lm_head.typed_data()));
  }
  return error;
}

template <typename T>
ffi::Error attend(ffi::AnyBuffer q, ffi::AnyBuffer k, ffi::AnyBuffer v, ffi::Result<ffi::AnyBuffer> out,
                  ffi::Result<ffi::AnyBuffer> keys, ffi::Result<ffi::AnyBuffer> values, Integers row, Integers position,
                  ffi::BufferR2<ffi::S32> table) {
  const auto queries = q.dimensions(), pages = keys->dimensions();
  const auto data = [](ffi::AnyBuffer& buffer) { return static_cast<T*>(buffer.untyped_data()); };
  Attention<T> call;
  call.tokens = queries[0], call.heads = queries[1], call.size = queries[2];
  call.pages = pages[0], call.kv_heads = pages[1], call.page_size = pages[2];
  call.rows = table.dimensions()[0], call.tables = table.dimensions()[1];
  call.q = data(q), call.k = data(k), call.v = data(v);
  call.row = row.typed_data(), call.position = position.typed_data(), call.table = table.typed_data();
  call.keys = data(*keys), call.values = data(*values), call.out = data(*out);
  ragged_attention(call);
  return ffi::Error::Success();
}

ffi::Error attend_ragged(ffi::AnyBuffer q, ffi::AnyBuffer k, ffi::AnyBuffer v, ffi::AnyBuffer keys_before,
                         ffi::AnyBuffer values_before, Integers row, Integers position, ffi::BufferR2<ffi::S32> table,
                         ffi::Result<ffi::AnyBuffer> out, ffi::Result<ffi::AnyBuffer> keys,
                         ffi::Result<ffi::AnyBuffer> values) {
  const auto queries = q.dimensions(), given = k.dimensions(), pages = keys->dimensions();
  const bool fit = queries.size() == 3 && given.size() == 3 && pages.size() == 4 && v.dimensions() == given &&
                   values->dimensions() == pages && out->dimensions() == queries && given[0] == queries[0] &&
                   given[1] == pages[1] && given[1] > 0 && queries[1] % given[1] == 0 && given[2] == queries[2] &&
                   given[2] == pages[3] && pages[2] > 0 && row.dimensions()[0] == queries[0] &&
                   position.dimensions()[0] == queries[0];
  if (!fit) return ffi::Error::InvalidArgument("the shapes of an attention's arguments do not fit each other");
  if (keys->untyped_data() != keys_before.untyped_data() || values->untyped_data() != values_before.untyped_data()) {
    return ffi::Error::Internal("the pages were not given in the memory in which they are to be returned");
  }
  for (const ffi::AnyBuffer& each : {k, v, *keys, *values, *out}) {
    if (each.element_type() != q.element_type()) return ffi::Error::InvalidArgument("an attention has one type");
  }
  switch (q.element_type()) {
    case ffi::F32: return attend<float>(q, k, v, out, keys, values, row, position, table);
    case ffi::BF16: return attend<uint16_t>(q, k, v, out, keys, values, row, position, table);
    default: return ffi::Error::InvalidArgument("attention is of float32 or bfloat16");
  }
}

// What sampling takes after its operands, and what it gives.
template <typename Binding>
auto sampling_of(Binding operands) {
  return std::move(operands)
      .template Arg<ffi::BufferR2<ffi::U32>>()  // noise keys of each row
      .template Arg<ffi::BufferR2<ffi::F32>>()  // temperature and threshold of each row
      .template Arg<ffi::BufferR1<ffi::S32>>()  // token of each column
      .template Ret<ffi::BufferR1<ffi::F32>>()  // score
      .template Ret<ffi::BufferR1<ffi::S32>>()  // column
      .template Ret<ffi::BufferR1<ffi::F32>>()  // top
      .template Ret<ffi::BufferR1<ffi::F32>>()  // mass
      .template Attr<bool>("softmax");
}

}  // namespace
}  // namespace specformer

#define HANDLER extern "C" __attribute__((visibility("default"))) XLA_FFI_Error*
HANDLER specformer_product(XLA_FFI_CallFrame*);
HANDLER specformer_four_bit_product(XLA_FFI_CallFrame*);
HANDLER specformer_product_of_rows(XLA_FFI_CallFrame*);
HANDLER specformer_rms_norm(XLA_FFI_CallFrame*);
HANDLER specformer_swiglu(XLA_FFI_CallFrame*);
HANDLER specformer_rotary(XLA_FFI_CallFrame*);
HANDLER specformer_sample_logits(XLA_FFI_CallFrame*);
HANDLER specformer_sample_hidden(XLA_FFI_CallFrame*);
HANDLER specformer_ragged_attention(XLA_FFI_CallFrame*);

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    specformer_product, specformer::packed_product,
    xla::ffi::Ffi::Bind()
        .Arg<xla::ffi::BufferR2<xla::ffi::BF16>>()
        .Arg<xla::ffi::BufferR4<xla::ffi::BF16>>()
        .Ret<xla::ffi::BufferR2<xla::ffi::BF16>>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    specformer_four_bit_product, specformer::product_by_records,
    xla::ffi::Ffi::Bind()
        .Arg<xla::ffi::BufferR2<xla::ffi::BF16>>()
        .Arg<xla::ffi::BufferR3<xla::ffi::U8>>()
        .Ret<xla::ffi::BufferR2<xla::ffi::BF16>>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    specformer_product_of_rows, specformer::rows_product,
    xla::ffi::Ffi::Bind()
        .Arg<xla::ffi::BufferR2<xla::ffi::BF16>>()
        .Arg<xla::ffi::BufferR2<xla::ffi::BF16>>()
        .Ret<xla::ffi::BufferR2<xla::ffi::F32>>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    specformer_rms_norm, specformer::norm,
    xla::ffi::Ffi::Bind()
        .Arg<xla::ffi::AnyBuffer>()  // x
        .Arg<xla::ffi::AnyBuffer>()  // scale
        .Ret<xla::ffi::AnyBuffer>()
        .Attr<float>("epsilon"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    specformer_swiglu, specformer::gated,
    xla::ffi::Ffi::Bind()
        .Arg<xla::ffi::BufferR3<xla::ffi::BF16>>()
        .Ret<xla::ffi::BufferR2<xla::ffi::BF16>>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    specformer_rotary, specformer::rotated,
    xla::ffi::Ffi::Bind()
        .Arg<xla::ffi::BufferR4<xla::ffi::BF16>>()   // qkv
        .Arg<xla::ffi::BufferR2<xla::ffi::F32>>()    // cos
        .Arg<xla::ffi::BufferR2<xla::ffi::F32>>()    // sin
        .Ret<xla::ffi::BufferR3<xla::ffi::BF16>>()   // q
        .Ret<xla::ffi::BufferR3<xla::ffi::BF16>>()   // k
        .Ret<xla::ffi::BufferR3<xla::ffi::BF16>>()); // v

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    specformer_sample_logits, specformer::sampled_logits,
    specformer::sampling_of(xla::ffi::Ffi::Bind()
        .Arg<xla::ffi::BufferR2<xla::ffi::F32>>()));  // logits

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    specformer_sample_hidden, specformer::sampled_hidden,
    specformer::sampling_of(xla::ffi::Ffi::Bind()
        .Arg<xla::ffi::BufferR2<xla::ffi::BF16>>()     // hidden
        .Arg<xla::ffi::BufferR2<xla::ffi::BF16>>()));  // LM head

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    specformer_ragged_attention, specformer::attend_ragged,
    xla::ffi::Ffi::Bind()
        .Arg<xla::ffi::AnyBuffer>()                  // q
        .Arg<xla::ffi::AnyBuffer>()                  // k
        .Arg<xla::ffi::AnyBuffer>()                  // v
        .Arg<xla::ffi::AnyBuffer>()                  // keys, in their pages
        .Arg<xla::ffi::AnyBuffer>()                  // values
        .Arg<xla::ffi::BufferR1<xla::ffi::S32>>()    // row of each token
        .Arg<xla::ffi::BufferR1<xla::ffi::S32>>()    // position of each token
        .Arg<xla::ffi::BufferR2<xla::ffi::S32>>()    // pages of each row
        .Ret<xla::ffi::AnyBuffer>()                  // out
        .Ret<xla::ffi::AnyBuffer>()                  // keys, in the same memory
        .Ret<xla::ffi::AnyBuffer>());                // values
