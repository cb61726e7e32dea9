// The cases of a test file, and the program that runs them: `main` is in run_cases.cpp.
#pragma once

#include <chrono>
#include <string>

#include "drawn.h"
#include "where.h"

namespace kfac2::tests {

// A case that fails is counted, and the next one runs, until the device is lost.
class Cases {
 public:
  explicit Cases(int asked_seeds) : asked_seeds_(asked_seeds) {}

  // Seeds to draw from: so many as the command line asks for, or as is usual.
  int seeds(int usual) const { return asked_seeds_ > 0 ? asked_seeds_ : usual; }

  // Runs a case, which throws where it fails. The seed is what it is drawn from.
  template <typename Run>
  void run(const char* name, int seed, const Run& run) {
    if (lost_) return;
    ++count_;
    try {
      run();
    } catch (const std::exception& error) {
      note_failure(name, seed, error.what());
    }
  }

  bool passed() const { return failed_ == 0 && count_ > 0; }
  bool lost() const { return lost_; }

  // "passed, 24 cases, 0.3 s"; "failed, 2 of 24 cases, 0.3 s; first: seed 3, ..."
  std::string summary() const;

 private:
  void note_failure(const char* name, int seed, const char* what);

  int asked_seeds_, count_ = 0, failed_ = 0;
  bool lost_ = false;
  std::string first_;
  std::chrono::steady_clock::time_point start_ = std::chrono::steady_clock::now();
};

// Makes a test file known: `const Registered here("kernels", run_all);`
struct Registered {
  Registered(const char* name, void (*run)(Cases&));
};

}  // namespace kfac2::tests
