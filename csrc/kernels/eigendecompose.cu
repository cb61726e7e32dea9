// One block for each matrix, all in one launch. A sweep meets every pair of indices once, in the rounds of a
// tournament: the pairs of a round share no index, so that they are rotated at the same time. A matrix of odd size
// gets a row and a column of zeros; the index that would meet them in a round rests.
//
// Floor: a round reads and writes V and half of the matrix once, in shared memory if they fit, with 4 d^2
// multiply-adds, between two barriers. A sweep is d rounds, one after the other; their latency is the cost, and
// the matrices of a call share it.
#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "device.h"
#include "eigendecompose.h"
#include "tables.h"

namespace kfac2::cuda {
namespace {

constexpr int kWarp = 32;
constexpr int kMaxThreads = 512;
constexpr int kMaxPairs = kMaxMatrixSize / 2;
constexpr unsigned kAllLanes = 0xffffffffu;

// |x|, or infinity for a NaN: the largest of many numbers is finite only if all are.
template <typename T>
__device__ T magnitude(T x) {
  const T size = std::fabs(x);
  return size <= std::numeric_limits<T>::max() ? size : std::numeric_limits<T>::infinity();
}

// Matrices are decomposed scaled by a power of two, which is exact, to a largest element in [1/2, 1): no square
// overflows or underflows, and an element is negligible if it is at most the machine epsilon.
template <typename T>
__device__ int exponent_of(T largest) {
  int exponent = 0;
  if (largest <= std::numeric_limits<T>::max()) std::frexp(largest, &exponent);
  return exponent;
}

// A NaN, which a sound matrix never gets, is negligible: no rotation is made from one, and the emulator's poison
// cannot pass for an element.
template <typename T>
__device__ bool is_negligible(T scaled) {
  return !(std::fabs(scaled) > std::numeric_limits<T>::epsilon());
}

// Turns x_p and x_q into cosine x_p - sine x_q and sine x_p + cosine x_q, for rows p and q and for columns p and q.
// The cosine is 1 - sine * half_tangent and never rounded to a number of its own: its rounding errors, one for each
// rotation, would add up in V (Rutishauser, "The Jacobi method for real symmetric matrices", 1966).
template <typename T>
struct Rotation {
  T tangent, sine;
  T half_tangent;  // of half the angle: sine / (1 + cosine)

  __device__ void apply(T& x_p, T& x_q) const {
    const T old = x_p;
    x_p -= sine * (x_q + half_tangent * old);
    x_q += sine * (old - half_tangent * x_q);
  }
};

// The rotation by at most 45 degrees that makes a_pq zero; a_pp then falls by tangent * a_pq and a_qq grows by it.
// a_pq is not negligible, so that theta is at most size / epsilon and its square does not overflow.
template <typename T>
__device__ Rotation<T> rotation_of(T a_pp, T a_qq, T a_pq) {
  const T theta = (a_qq - a_pp) / (2 * a_pq);
  const T positive = 1 / (std::fabs(theta) + std::sqrt(1 + theta * theta));
  const T tangent = theta < 0 ? -positive : positive;
  const T cosine = 1 / std::sqrt(1 + tangent * tangent);
  return {tangent, tangent * cosine, tangent * cosine / (1 + cosine)};
}

// The eigenvalue of the matrix itself, from that of the scaled one; floored at 0.
template <typename T>
__device__ T unscaled(T value, int exponent) {
  return value > 0 ? std::ldexp(value, exponent) : T(0);
}

// A stack, and where the blocks that decompose it work.
struct Entry : MatrixStack {
  bool matrix_shared, vectors_shared;  // else in the workspace
  int64_t matrix_bytes;
  int64_t scratch;        // where the first matrix's share of the workspace begins, in bytes
  int64_t scratch_bytes;  // of each matrix
};

// The shared memory of every block. Its matrix and V follow if they fit.
template <typename T>
struct alignas(16) Shared {
  T sine[kMaxPairs], half_tangent[kMaxPairs];  // of the pairs of this round
  T largest[kMaxThreads / kWarp];              // of the elements that a warp has seen
  int order[kMaxMatrixSize];                   // the index of the j-th eigenvalue
  int above[kMaxSweeps + 1];                   // before this sweep: an element is not negligible

  __device__ Rotation<T> rotation(int pair) const { return {0, sine[pair], half_tangent[pair]}; }
};

template <typename T>
struct Work {
  Shared<T>& shared;
  T* a;          // [n, n]: turns diagonal
  T* v;          // [d, v_stride]: the eigenvectors, in rows
  int d, n;      // n is d made even
  int v_stride;  // odd: columns are read without bank conflicts, too
};

// Numbers first, first + step, ... as major * size + minor: one division for all.
struct Walk {
  int item, major, minor, size, step, major_step, minor_step;

  __device__ explicit Walk(int size_)
      : item(threadIdx.x),
        major(item / size_),
        minor(item % size_),
        size(size_),
        step(blockDim.x),
        major_step(step / size_),
        minor_step(step % size_) {}

  __device__ void next() {
    item += step;
    major += major_step;
    minor += minor_step;
    if (minor >= size) {
      minor -= size;
      ++major;
    }
  }
};

struct Pair {
  int p, q;
};

// The k-th pair of a round: index n - 1 stays where it is, the others move on by one place in each round. With p and
// q of neighbouring pairs one apart and n even, elements (p, p'), (p, q') and so on of a warp lie n + 1 or n - 1
// apart, an odd number: in different banks, but for the one place where the circle closes.
__device__ Pair pair_of(int k, int round, int n) {
  if (k == 0) return {round, n - 1};
  const int circle = n - 1, p = round + k, q = round - k;
  return {p < circle ? p : p - circle, q >= 0 ? q : q + circle};
}

// The largest magnitude of the matrix, the same in all threads; infinity if not all are finite.
template <typename T>
__device__ T largest_of(const Work<T>& work, const T* matrix) {
  T largest = 0;
  for (int i = threadIdx.x; i < work.d * work.d; i += blockDim.x) largest = std::max(largest, magnitude(matrix[i]));
  for (int distance = kWarp / 2; distance > 0; distance /= 2)
    largest = std::max(largest, __shfl_xor_sync(kAllLanes, largest, distance));
  if (threadIdx.x % kWarp == 0) work.shared.largest[threadIdx.x / kWarp] = largest;
  __syncthreads();
  for (int warp = 0; warp < static_cast<int>(blockDim.x) / kWarp; ++warp)
    largest = std::max(largest, work.shared.largest[warp]);
  return largest;
}

// The matrix, scaled, and V = I. A matrix that is not finite becomes 0.
template <typename T>
__device__ void load(const Work<T>& work, const T* matrix, bool finite, int exponent) {
  for (Walk at(work.d); at.major < work.d; at.next()) {
    work.v[at.major * work.v_stride + at.minor] = at.major == at.minor ? 1 : 0;
    if (at.minor > at.major) continue;
    const T element = finite ? std::ldexp(matrix[at.item], -exponent) : T(0);
    work.a[at.major * work.n + at.minor] = work.a[at.minor * work.n + at.major] = element;
  }
  if (work.d == work.n) return;
  for (int i = threadIdx.x; i < work.n; i += blockDim.x) work.a[work.d * work.n + i] = work.a[i * work.n + work.d] = 0;
}

template <typename T>
__device__ bool is_diagonal(const Work<T>& work, int sweep) {
  bool above = false;
  for (Walk at(work.n); at.major < work.n; at.next())
    above = above || (at.major != at.minor && !is_negligible(work.a[at.item]));
  if (above) work.shared.above[sweep] = 1;  // whoever writes, writes this
  __syncthreads();
  return work.shared.above[sweep] == 0;
}

// A pair that rests, or whose element is negligible, keeps the identity.
template <typename T>
__device__ void find_rotations(const Work<T>& work, int round) {
  for (int k = threadIdx.x; k < work.n / 2; k += blockDim.x) {
    const Pair pair = pair_of(k, round, work.n);
    T &a_pp = work.a[pair.p * (work.n + 1)], &a_qq = work.a[pair.q * (work.n + 1)];
    const T a_pq = work.a[pair.p * work.n + pair.q];
    Rotation<T> rotation{0, 0, 0};
    if (!is_negligible(a_pq)) {
      rotation = rotation_of(a_pp, a_qq, a_pq);
      a_pp -= rotation.tangent * a_pq;
      a_qq += rotation.tangent * a_pq;
      work.a[pair.p * work.n + pair.q] = work.a[pair.q * work.n + pair.p] = 0;
    }
    work.shared.sine[k] = rotation.sine;
    work.shared.half_tangent[k] = rotation.half_tangent;
  }
}

// The 2 x 2 elements in the rows of one pair and the columns of another are rotated from both sides by one thread,
// and written to the mirrored place, too: once for each two pairs. Pair k meets k + 1, k + 2, ... cyclically.
template <typename T>
__device__ void rotate_matrix(const Work<T>& work, int round) {
  const int n = work.n, pairs = n / 2;
  T* a = work.a;
  for (Walk at(pairs); at.item < pairs * (pairs - 1) / 2; at.next()) {
    const int i = at.minor, next = i + 1 + at.major, j = next < pairs ? next : next - pairs;
    const Rotation<T> left = work.shared.rotation(i), right = work.shared.rotation(j);
    if (left.sine == 0 && right.sine == 0) continue;
    const Pair row = pair_of(i, round, n), column = pair_of(j, round, n);
    T pp = a[row.p * n + column.p], pq = a[row.p * n + column.q];
    T qp = a[row.q * n + column.p], qq = a[row.q * n + column.q];
    left.apply(pp, qp);
    left.apply(pq, qq);
    right.apply(pp, pq);
    right.apply(qp, qq);
    a[row.p * n + column.p] = a[column.p * n + row.p] = pp;
    a[row.p * n + column.q] = a[column.q * n + row.p] = pq;
    a[row.q * n + column.p] = a[column.p * n + row.q] = qp;
    a[row.q * n + column.q] = a[column.q * n + row.q] = qq;
  }
}

template <typename T>
__device__ void rotate_vectors(const Work<T>& work, int round) {
  for (Walk at(work.d); at.major < work.n / 2; at.next()) {
    const Rotation<T> rotation = work.shared.rotation(at.major);
    if (rotation.sine == 0) continue;  // also where the pair rests: V has no row for the zeros
    const Pair pair = pair_of(at.major, round, work.n);
    rotation.apply(work.v[pair.p * work.v_stride + at.minor], work.v[pair.q * work.v_stride + at.minor]);
  }
}

// Makes the matrix diagonal; false if so many sweeps do not.
template <typename T>
__device__ bool diagonalise(const Work<T>& work, int max_sweeps) {
  for (int sweep = 0; !is_diagonal(work, sweep); ++sweep) {
    if (sweep == max_sweeps) return false;
    for (int round = 0; round < work.n - 1; ++round) {
      find_rotations(work, round);
      __syncthreads();
      rotate_matrix(work, round);
      rotate_vectors(work, round);
      __syncthreads();
    }
  }
  return true;
}

// Each eigenvalue counts those before it.
template <typename T>
__device__ void write_ascending(const Work<T>& work, int exponent, T* values, T* vectors) {
  const int d = work.d;
  for (int j = threadIdx.x; j < d; j += blockDim.x) {
    const T value = work.a[j * (work.n + 1)];
    int before = 0;
    for (int i = 0; i < d; ++i) {
      const T other = work.a[i * (work.n + 1)];
      before += other < value || (other == value && i < j);
    }
    work.shared.order[before] = j;
    values[before] = unscaled(value, exponent);
  }
  __syncthreads();
  for (Walk at(d); at.major < d; at.next())
    vectors[at.item] = work.v[work.shared.order[at.minor] * work.v_stride + at.major];
}

template <typename T>
__device__ Work<T> work_of(const Entry& entry, int64_t number, unsigned char* shared, unsigned char* workspace) {
  const int d = static_cast<int>(entry.size);
  unsigned char* in_shared = shared + sizeof(Shared<T>);
  unsigned char* in_workspace = workspace + entry.scratch + number * entry.scratch_bytes;
  unsigned char*& matrix = entry.matrix_shared ? in_shared : in_workspace;
  T* a = reinterpret_cast<T*>(matrix);
  matrix += entry.matrix_bytes;
  T* v = reinterpret_cast<T*>(entry.vectors_shared ? in_shared : in_workspace);
  return {*reinterpret_cast<Shared<T>*>(shared), a, v, d, d + d % 2, d | 1};
}

template <typename T>
__global__ void __launch_bounds__(kMaxThreads, 1)
    eigendecompose_kernel(const Entry* entries, int count, int max_sweeps, int32_t* status, unsigned char* workspace) {
  KFAC2_SHARED(unsigned char, shared);
  const Entry& entry = entries[entry_of(entries, count, blockIdx.x)];
  const int64_t number = blockIdx.x - entry.first_item, d = entry.size;
  const Work<T> work = work_of<T>(entry, number, &shared, workspace);
  for (int sweep = threadIdx.x; sweep <= max_sweeps; sweep += blockDim.x) work.shared.above[sweep] = 0;
  const T* matrix = static_cast<const T*>(entry.matrices) + number * d * d;
  const T largest = largest_of(work, matrix);
  const bool finite = largest <= std::numeric_limits<T>::max();
  const int exponent = exponent_of(largest);
  load(work, matrix, finite, exponent);
  __syncthreads();
  const bool converged = diagonalise(work, max_sweeps);
  write_ascending(work, exponent, static_cast<T*>(entry.values) + number * d,
                  static_cast<T*>(entry.vectors) + number * d * d);
  if (threadIdx.x > 0) return;
  const EigenStatus result = converged ? EigenStatus::kGood : EigenStatus::kNotConverged;
  status[blockIdx.x] = static_cast<int32_t>(finite ? result : EigenStatus::kNotFinite);
}

class Eigendecompose : public TableLaunch {
 public:
  explicit Eigendecompose(const EigendecomposeParams& params) : params_(params) {
    const int64_t fixed = params.is_double ? sizeof(Shared<double>) : sizeof(Shared<float>);
    const int64_t element = params.is_double ? sizeof(double) : sizeof(float);
    shared_bytes_ = fixed;
    std::vector<Entry> entries;
    for (int64_t s = 0; s < params.stack_count; ++s) {
      const MatrixStack& stack = params.stacks[s];
      const int64_t n = stack.size + stack.size % 2, matrix = n * n * element;
      const int64_t vectors = ceil_div(stack.size * (stack.size | 1) * element, 16) * 16;
      // V leaves shared memory first: it is read row by row, which the caches do well.
      const bool matrix_shared = fixed + matrix <= params.shared_limit;
      const bool vectors_shared = fixed + matrix + vectors <= params.shared_limit;
      const int64_t bytes = (matrix_shared ? 0 : matrix) + (vectors_shared ? 0 : vectors);
      entries.push_back({{stack}, matrix_shared, vectors_shared, matrix, scratch_bytes_, bytes});
      scratch_bytes_ += stack.count * bytes;
      shared_bytes_ = std::max(shared_bytes_, fixed + matrix + vectors - bytes);
      largest_size_ = std::max(largest_size_, stack.size);
    }
    possible_ = largest_size_ <= kMaxMatrixSize && params.max_sweeps <= kMaxSweeps;
    entries_ = add(entries);
  }

 private:
  cudaError_t start(unsigned char* workspace, cudaStream_t stream) const override {
    unsigned threads = kWarp;  // a round has some d^2 / 2 rotations of two or four elements
    while (threads < kMaxThreads && threads < 4 * largest_size_) threads *= 2;
    const auto kernel = params_.is_double ? eigendecompose_kernel<double> : eigendecompose_kernel<float>;
    return launch(kernel, dim3(static_cast<unsigned>(params_.matrices)), dim3(threads),
                  static_cast<size_t>(shared_bytes_), stream, at(workspace, entries_),
                  static_cast<int>(params_.stack_count), params_.max_sweeps, params_.status, scratch(workspace));
  }

  EigendecomposeParams params_;
  int64_t shared_bytes_ = 0, largest_size_ = 1;
  TableAt<Entry> entries_;
};

}  // namespace

std::unique_ptr<Launch> eigendecompose(const EigendecomposeParams& params) {
  return std::make_unique<Eigendecompose>(params);
}

}  // namespace kfac2::cuda
