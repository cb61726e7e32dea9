// Floor: the upper triangles and what was there before read once, the triangles written once. Who takes the library's
// product is on a CUDA device: here the loops are plain.
#include "fold_products.h"

#include <algorithm>
#include <vector>

#include "shares.h"

namespace kfac2::cpu {
namespace {

template <typename T>
void fold_line(const PanelProduct& product, double kept, int64_t line) {
  const Triangle triangle{product.size()};
  const int64_t begin = line * triangle.width();
  T* const result = static_cast<T*>(product.result) + begin;
  const T* const previous = product.previous == nullptr ? nullptr : static_cast<const T*>(product.previous) + begin;
  for (int64_t place = 0; place < triangle.width(); ++place) {
    int64_t row, column;
    triangle.element(line, place, &row, &column);
    const T sum = static_cast<T>(product.scale) * product.at<T>(row, column);
    result[place] = previous == nullptr ? sum : sum + static_cast<T>(kept) * previous[place];
  }
}

// A line of the triangle of a product.
struct Line {
  int64_t product, line;
};

class FoldProducts : public Work {
 public:
  explicit FoldProducts(const FoldProductsParams& params) : params_(params) {
    for (int64_t i = 0; i < params.count; ++i)
      for (int64_t line = 0; line < Triangle{params.products[i].size()}.height(); ++line) lines_.push_back({i, line});
    first_line_ = shares(static_cast<int64_t>(lines_.size()),
                         [&](int64_t i) { return Triangle{params.products[lines_[i].product].size()}.width(); });
  }

  int64_t tasks() const override { return static_cast<int64_t>(first_line_.size()) - 1; }

  void run_task(int64_t task) override {
    for (int64_t i = first_line_[task]; i < first_line_[task + 1]; ++i) {
      const PanelProduct& product = params_.products[lines_[i].product];
      product.is_double ? fold_line<double>(product, params_.kept, lines_[i].line)
                        : fold_line<float>(product, params_.kept, lines_[i].line);
    }
  }

 private:
  FoldProductsParams params_;
  std::vector<Line> lines_;          // of all products
  std::vector<int64_t> first_line_;  // of each task, and their number
};

}  // namespace

std::unique_ptr<Work> fold_products(const FoldProductsParams& params) { return std::make_unique<FoldProducts>(params); }

}  // namespace kfac2::cpu
