// A WASI command in wasmtime, without Python: machine code from a file, started and ended.
//
// Takes the machine code that wasmtime itself wrote with its default configuration, and trusts it:
// give it nothing that you did not compile yourself.

#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <string>

// Of wasmtime's C API, version 50: the wheel has the library, and no header.
extern "C" {
struct wasm_engine_t;
struct wasm_trap_t;
struct wasmtime_error_t;
struct wasmtime_module_t;
struct wasmtime_linker_t;
struct wasmtime_store_t;
struct wasmtime_context_t;
struct wasi_config_t;
struct wasm_byte_vec_t {
  size_t size;
  char *data;
};
struct wasmtime_func_t {
  uint64_t store_id;
  void *priv;
};
union wasmtime_val_raw_t {
  unsigned char bytes[16];
  uint64_t align;
};
wasm_engine_t *wasm_engine_new();
wasmtime_error_t *wasmtime_module_deserialize_file(wasm_engine_t *, const char *,
                                                   wasmtime_module_t **);
wasmtime_store_t *wasmtime_store_new(wasm_engine_t *, void *, void (*)(void *));
wasmtime_context_t *wasmtime_store_context(wasmtime_store_t *);
wasi_config_t *wasi_config_new();
bool wasi_config_set_argv(wasi_config_t *, size_t, const char **);
void wasi_config_inherit_stdin(wasi_config_t *);
void wasi_config_inherit_stdout(wasi_config_t *);
void wasi_config_inherit_stderr(wasi_config_t *);
bool wasi_config_preopen_dir(wasi_config_t *, const char *, const char *, size_t, size_t);
wasmtime_error_t *wasmtime_context_set_wasi(wasmtime_context_t *, wasi_config_t *);
wasmtime_linker_t *wasmtime_linker_new(wasm_engine_t *);
wasmtime_error_t *wasmtime_linker_define_wasi(wasmtime_linker_t *);
wasmtime_error_t *wasmtime_linker_module(wasmtime_linker_t *, wasmtime_context_t *, const char *,
                                         size_t, const wasmtime_module_t *);
wasmtime_error_t *wasmtime_linker_get_default(wasmtime_linker_t *, wasmtime_context_t *,
                                              const char *, size_t, wasmtime_func_t *);
wasmtime_error_t *wasmtime_func_call_unchecked(wasmtime_context_t *, const wasmtime_func_t *,
                                               wasmtime_val_raw_t *, size_t, wasm_trap_t **);
bool wasmtime_error_exit_status(const wasmtime_error_t *, int *);
void wasmtime_error_message(const wasmtime_error_t *, wasm_byte_vec_t *);
void wasm_trap_message(const wasm_trap_t *, wasm_byte_vec_t *);
}

namespace {

constexpr size_t kReadOnly = 1;  // of folders and of files

int failed(const char *what, const wasmtime_error_t *error, const wasm_trap_t *trap = nullptr) {
  wasm_byte_vec_t message{0, nullptr};
  int status = 0;
  if (error != nullptr) {
    if (wasmtime_error_exit_status(error, &status)) return status;
    wasmtime_error_message(error, &message);
  } else if (trap != nullptr) {
    wasm_trap_message(trap, &message);
  }
  std::fprintf(stderr, "wasmtime: %s: %.*s\n", what, static_cast<int>(message.size), message.data);
  return 1;
}

}  // namespace

int main(int count, char **arguments) {
  // GUEST=HOST … -- MACHINE_CODE ARGUMENT …
  int dashes = 1;
  while (dashes < count && std::strcmp(arguments[dashes], "--") != 0) ++dashes;
  if (dashes + 1 >= count) {
    std::fprintf(stderr, "usage: wasmtime [GUEST_FOLDER=FOLDER ...] -- CODE.cwasm [ARGUMENT ...]\n");
    return 2;
  }
  wasm_engine_t *engine = wasm_engine_new();
  wasmtime_module_t *module = nullptr;
  const char *code = arguments[dashes + 1];
  if (auto *error = wasmtime_module_deserialize_file(engine, code, &module)) {
    return failed(code, error);
  }
  wasmtime_store_t *store = wasmtime_store_new(engine, nullptr, nullptr);
  wasmtime_context_t *context = wasmtime_store_context(store);

  wasi_config_t *wasi = wasi_config_new();
  auto **argv = const_cast<const char **>(arguments + dashes + 1);
  if (!wasi_config_set_argv(wasi, static_cast<size_t>(count - dashes - 1), argv)) {
    std::fprintf(stderr, "wasmtime: the arguments are not UTF-8\n");
    return 1;
  }
  wasi_config_inherit_stdin(wasi);
  wasi_config_inherit_stdout(wasi);
  wasi_config_inherit_stderr(wasi);
  for (int place = 1; place < dashes; ++place) {
    const std::string pair = arguments[place];
    const size_t equals = pair.find('=');
    if (equals == std::string::npos ||
        !wasi_config_preopen_dir(wasi, pair.substr(equals + 1).c_str(),
                                 pair.substr(0, equals).c_str(), kReadOnly, kReadOnly)) {
      std::fprintf(stderr, "wasmtime: can't open %s\n", arguments[place]);
      return 1;
    }
  }
  if (auto *error = wasmtime_context_set_wasi(context, wasi)) return failed("WASI", error);

  wasmtime_linker_t *linker = wasmtime_linker_new(engine);
  wasmtime_func_t start{};
  wasmtime_error_t *error = wasmtime_linker_define_wasi(linker);
  if (error == nullptr) error = wasmtime_linker_module(linker, context, "", 0, module);
  if (error == nullptr) error = wasmtime_linker_get_default(linker, context, "", 0, &start);
  if (error != nullptr) return failed("can't instantiate", error);

  wasm_trap_t *trap = nullptr;
  wasmtime_val_raw_t nothing{};
  error = wasmtime_func_call_unchecked(context, &start, &nothing, 0, &trap);
  // The process ends here and takes all of this along.
  return error != nullptr || trap != nullptr ? failed("the guest", error, trap) : 0;
}
