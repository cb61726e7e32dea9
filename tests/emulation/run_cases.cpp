// Runs the test files that are linked with it, or those that are named, on the emulator or on a CUDA device:
//
//   device_tests [--no-poison] [seeds] [names]
//   device_tests --device          only looks for a device
//
// A line for each file. The exit status is 0 if all passed, 1 if not, 77 without a device. An illegal access takes the
// whole process's context with it: then what is left runs in a new one.
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include "cases.h"

#ifndef KFAC2_EMULATE
// The linker brings every launch here (--wrap): compat.h starts kernels in this way alone.
extern "C" cudaError_t __real_cudaLaunchKernelExC(const cudaLaunchConfig_t*, const void*, void**);
extern "C" cudaError_t __wrap_cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* kernel, void** args);
#endif

namespace kfac2::tests {
namespace {

constexpr int kNoDevice = 77;

struct TestFile {
  std::string name;
  void (*run)(Cases&);
};

std::vector<TestFile>& files() {
  static std::vector<TestFile> all;
  return all;
}

struct Options {
  bool poison = true, look = false, failed = false;  // failed: in the process before this one
  int seeds = 0;
  std::vector<std::string> names;
};

Options options;

#ifdef KFAC2_EMULATE

bool find_device() { return true; }
bool device_is_lost() { return false; }

std::string order_text() {
  const char* names[] = {"forward", "reverse", "shuffled"};
  return std::string(", ") + names[static_cast<int>(emulation::order())] + " order";
}

#else

int64_t launches_run = 0;

bool find_device() {
  int count = 0;
  const cudaError_t status = cudaGetDeviceCount(&count);
  if (status != cudaSuccess || count == 0) {
    std::printf("%s\nno device\n", cudaGetErrorString(status));
    return false;
  }
  cudaDeviceProp device;
  int driver = 0, runtime = 0;
  if (cudaGetDeviceProperties(&device, 0) == cudaSuccess && cudaDriverGetVersion(&driver) == cudaSuccess &&
      cudaRuntimeGetVersion(&runtime) == cudaSuccess)
    std::printf("%s, sm_%d%d; CUDA of the driver %d, of this program %d\n", device.name, device.major, device.minor,
                driver, runtime);
  return true;
}

bool device_is_lost() {
  cudaGetLastError();  // one that does not last is gone now
  return cudaDeviceSynchronize() != cudaSuccess;
}

std::string order_text() { return ""; }

#endif

Options read(int count, char** arguments) {
  Options read;
  for (int i = 1; i < count; ++i) {
    const std::string argument = arguments[i];
    if (argument == "--no-poison") {
      read.poison = false;
    } else if (argument == "--device") {
      read.look = true;
    } else if (argument == "--failed") {
      read.failed = true;
    } else if (argument.find_first_not_of("0123456789") == std::string::npos) {
      read.seeds = std::atoi(argument.c_str());
    } else {
      read.names.push_back(argument);
    }
  }
  return read;
}

// The rest in a new process, in the place of this one.
int run_elsewhere(const std::vector<TestFile>& rest) {
  std::vector<std::string> words = {"device_tests", "--failed", std::to_string(options.seeds)};
  if (!options.poison) words.push_back("--no-poison");
  for (const TestFile& file : rest) words.push_back(file.name);
  std::vector<char*> arguments;
  for (std::string& word : words) arguments.push_back(word.data());
  arguments.push_back(nullptr);
  execv("/proc/self/exe", arguments.data());
  std::perror("the other tests did not run");
  return 1;
}

std::vector<TestFile> chosen() {
  std::vector<TestFile> all = files();
  std::sort(all.begin(), all.end(), [](const TestFile& a, const TestFile& b) { return a.name < b.name; });
  if (options.names.empty()) return all;
  std::vector<TestFile> some;
  for (const std::string& name : options.names) {
    const auto found = std::find_if(all.begin(), all.end(), [&](const TestFile& file) { return file.name == name; });
    if (found == all.end()) {
      std::fprintf(stderr, "there is no test '%s'\n", name.c_str());
      std::exit(1);
    }
    some.push_back(*found);
  }
  return some;
}

int run_files() {
  const std::vector<TestFile> all = chosen();
  bool passed = !options.failed && !all.empty();
  for (size_t i = 0; i < all.size(); ++i) {
    Cases cases(options.seeds);
    all[i].run(cases);
    std::printf("%s: %s\n", all[i].name.c_str(), cases.summary().c_str());
    std::fflush(stdout);
    passed = passed && cases.passed();
    if (cases.lost() && i + 1 < all.size()) return run_elsewhere({all.begin() + i + 1, all.end()});
  }
  return passed ? 0 : 1;
}

}  // namespace

bool poisoned() { return options.poison; }

#ifndef KFAC2_EMULATE
int64_t launches() { return launches_run; }
#endif

std::string Cases::summary() const {
  char text[64];
  const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start_).count();
  std::snprintf(text, sizeof text, " cases, %.1f s", seconds);
  if (failed_ == 0) return (count_ > 0 ? "passed, " : "failed, ") + std::to_string(count_) + text;
  return "failed, " + std::to_string(failed_) + " of " + std::to_string(count_) + text +
         (lost_ ? ", the device was lost" : "") + "; first: " + first_;
}

void Cases::note_failure(const char* name, int seed, const char* what) {
  if (failed_++ == 0) first_ = "seed " + std::to_string(seed) + order_text() + ", " + name + ": " + what;
  lost_ = device_is_lost();
}

Registered::Registered(const char* name, void (*run)(Cases&)) { files().push_back({name, run}); }

}  // namespace kfac2::tests

#ifndef KFAC2_EMULATE
cudaError_t __wrap_cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* kernel, void** args) {
  ++kfac2::tests::launches_run;
  return __real_cudaLaunchKernelExC(config, kernel, args);
}
#endif

int main(int count, char** arguments) {
  using namespace kfac2::tests;
  options = read(count, arguments);
  std::setvbuf(stdout, nullptr, _IOLBF, 0);
  if (!find_device()) return kNoDevice;
  return options.look ? 0 : run_files();
}
