// Floor: the upper triangle and what was there before read once, the triangle written once. Who takes the library's
// product is on a CUDA device: here the loops are plain.
#include "fold_products.h"

#include <algorithm>

#include "shares.h"

namespace kfac2::cpu {
namespace {

template <typename T>
void fold_line(const FoldProductsParams& params, const Panels<T>& matrix, int64_t line) {
  const Triangle triangle{params.size()};
  const int64_t begin = line * triangle.width();
  T* const result = static_cast<T*>(params.result) + begin;
  const T* const previous = params.previous == nullptr ? nullptr : static_cast<const T*>(params.previous) + begin;
  for (int64_t place = 0; place < triangle.width(); ++place) {
    int64_t row, column;
    triangle.element(line, place, &row, &column);
    const T sum = static_cast<T>(params.scale) * matrix.at(row, column);
    result[place] = previous == nullptr ? sum : sum + static_cast<T>(params.kept) * previous[place];
  }
}

class FoldProducts : public Work {
 public:
  explicit FoldProducts(const FoldProductsParams& params)
      : params_(params), lines_(Triangle{params.size()}.height()), lines_of_task_(lines_of_task(params.size())) {}

  int64_t tasks() const override { return (lines_ + lines_of_task_ - 1) / lines_of_task_; }

  void run_task(int64_t task) override {
    const int64_t begin = task * lines_of_task_, end = std::min(begin + lines_of_task_, lines_);
    params_.is_double ? run<double>(begin, end) : run<float>(begin, end);
  }

 private:
  static int64_t lines_of_task(int64_t size) { return std::max<int64_t>(1, kElementsPerTask / Triangle{size}.width()); }

  template <typename T>
  void run(int64_t begin, int64_t end) const {
    const Panels<T> matrix = params_.matrix<T>();
    for (int64_t line = begin; line < end; ++line) fold_line(params_, matrix, line);
  }

  FoldProductsParams params_;
  int64_t lines_, lines_of_task_;
};

}  // namespace

std::unique_ptr<Work> fold_products(const FoldProductsParams& params) { return std::make_unique<FoldProducts>(params); }

}  // namespace kfac2::cpu
