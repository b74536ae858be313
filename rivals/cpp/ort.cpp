// A prepared picture in, its label out: ONNX Runtime, through its C++ API, without Python.
//
// The first line on stdout is the label, the second the logits. With REPEATS > 0 the third has the
// time of each further run in milliseconds, from the tensor to the label.

#define ORT_API_MANUAL_INIT
#include <dlfcn.h>
#include <onnxruntime_cxx_api.h>

#include <algorithm>
#include <array>
#include <charconv>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <stdexcept>
#include <string>
#include <vector>

namespace {

constexpr const char *kUsage = "usage: ort MODEL.onnx TENSOR.f32 LABELS.txt REPEATS LIBONNXRUNTIME";
constexpr unsigned kMaxRepeats = 1'000'000;

// The API of the library at a path; there is no need to link with it.
void use_library(const char *path) {
  void *library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) throw std::runtime_error(dlerror());
  void *symbol = dlsym(library, "OrtGetApiBase");
  if (symbol == nullptr) throw std::runtime_error(std::string(path) + ": no ONNX Runtime");
  const OrtApiBase *(*base)() = nullptr;
  std::memcpy(&base, &symbol, sizeof base);
  const OrtApi *api = base()->GetApi(ORT_API_VERSION);
  if (api == nullptr) {
    throw std::runtime_error(std::string(path) + " is version " + base()->GetVersionString() +
                             "; needed is 1." + std::to_string(ORT_API_VERSION) + " or newer");
  }
  Ort::InitApi(api);
}

std::ifstream opened(const char *path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) throw std::runtime_error(std::string("can't read ") + path);
  return file;
}

// float32 in this machine's order, exactly as many as the shape has.
std::vector<float> floats(const char *path, const std::vector<int64_t> &shape) {
  uint64_t count = 1;
  for (int64_t side : shape) {
    if (__builtin_mul_overflow(count, static_cast<uint64_t>(side), &count) || count > 1U << 28) {
      throw std::runtime_error("the model's input is too large");
    }
  }
  std::ifstream file = opened(path);
  std::vector<float> values(count);
  const auto size = static_cast<std::streamsize>(count * sizeof(float));
  if (!file.read(reinterpret_cast<char *>(values.data()), size) || file.peek() != EOF) {
    throw std::runtime_error(std::string(path) + ": the model takes " + std::to_string(count) +
                             " float32 values");
  }
  return values;
}

std::vector<std::string> lines(const char *path) {
  std::ifstream file = opened(path);
  std::vector<std::string> found;
  for (std::string line; std::getline(file, line);) found.push_back(line);
  return found;
}

void answer(const char *model, const char *tensor, const char *labels, unsigned repeats) {
  Ort::Env env(ORT_LOGGING_LEVEL_FATAL, "ort");
  // What edgelab.wasinn.backends.onnx.session_options gives every row, with one thread.
  Ort::SessionOptions options;
  options.SetIntraOpNumThreads(1).SetInterOpNumThreads(1).SetLogSeverityLevel(4);
  options.AddConfigEntry("session.intra_op.allow_spinning", "0");
  options.AddConfigEntry("session.load_model_format", "ONNX");
  Ort::Session session(env, model, options);
  if (session.GetInputCount() != 1) throw std::runtime_error("the model needs one input");

  const Ort::TypeInfo type = session.GetInputTypeInfo(0);
  const auto info = type.GetTensorTypeAndShapeInfo();
  if (info.GetElementType() != ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT) {
    throw std::runtime_error("the model's input is not float32");
  }
  std::vector<int64_t> shape = info.GetShape();
  for (int64_t &side : shape) side = side < 0 ? 1 : side;  // open, such as the batch
  std::vector<float> values = floats(tensor, shape);

  const auto memory = Ort::MemoryInfo::CreateCpu(OrtDeviceAllocator, OrtMemTypeDefault);
  const auto input = Ort::Value::CreateTensor<float>(memory, values.data(), values.size(),
                                                     shape.data(), shape.size());
  Ort::AllocatorWithDefaultOptions allocator;
  const auto input_name = session.GetInputNameAllocated(0, allocator);
  const auto output_name = session.GetOutputNameAllocated(0, allocator);
  const std::array<const char *, 1> inputs{input_name.get()}, outputs{output_name.get()};

  std::vector<float> logits;
  const auto run = [&] {
    const auto results =
        session.Run(Ort::RunOptions{nullptr}, inputs.data(), &input, 1, outputs.data(), 1);
    const auto found = results[0].GetTensorTypeAndShapeInfo();
    if (found.GetElementType() != ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT) {
      throw std::runtime_error("the model's output is not float32");
    }
    const auto *first = results[0].GetTensorData<float>();
    logits.assign(first, first + found.GetElementCount());
    return static_cast<size_t>(std::max_element(logits.begin(), logits.end()) - logits.begin());
  };
  const size_t best = run();
  const std::vector<std::string> names = lines(labels);
  if (logits.empty() || names.size() != logits.size()) {
    throw std::runtime_error(std::to_string(names.size()) + " labels for " +
                             std::to_string(logits.size()) + " logits");
  }
  std::printf("%s\n", names[best].c_str());
  std::fflush(stdout);
  for (float logit : logits) std::printf("%.9g ", static_cast<double>(logit));
  std::printf("\n");

  std::vector<double> times;
  for (unsigned k = 0; k < repeats; ++k) {
    const auto start = std::chrono::steady_clock::now();
    run();
    const std::chrono::duration<double, std::milli> took = std::chrono::steady_clock::now() - start;
    times.push_back(took.count());
  }
  for (double time : times) std::printf("%.6f ", time);
  if (repeats > 0) std::printf("\n");
}

}  // namespace

int main(int count, char **arguments) {
  unsigned repeats = 0;
  if (count != 6) {
    std::fprintf(stderr, "%s\n", kUsage);
    return 2;
  }
  const char *text = arguments[4], *end = text + std::strlen(text);
  const auto parsed = std::from_chars(text, end, repeats);
  if (parsed.ec != std::errc() || parsed.ptr != end || repeats > kMaxRepeats) {
    std::fprintf(stderr, "%s\n(REPEATS is a whole number, at most %u)\n", kUsage, kMaxRepeats);
    return 2;
  }
  try {
    use_library(arguments[5]);
    answer(arguments[1], arguments[2], arguments[3], repeats);
    return 0;
  } catch (const std::exception &error) {  // Ort::Exception is one
    std::fprintf(stderr, "ort: %s\n", error.what());
    return 1;
  }
}
