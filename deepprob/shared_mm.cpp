// A matrix product, shared out among the calling thread and helpers.
//
// Its output is cut into chunks, and whoever is free takes the next one. A helper that the system has put aside takes
// none, and the calling thread computes every chunk itself; only a chunk that a helper has begun is waited for. OpenMP,
// which gives each thread its part beforehand, makes every product wait for a busy core.

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <mutex>
#include <system_error>
#include <thread>

namespace at {
void set_num_threads(int);
}

namespace {

constexpr auto kAwake = std::chrono::microseconds(200);  // of a helper between products, as waking it up takes long
constexpr int64_t kChunk = int64_t{1} << 21;             // least multiplications of a chunk
constexpr int64_t kLarge = int64_t{1} << 24;             // from here on each thread has two chunks
constexpr uint32_t kCount = 255;                         // the bits of `tickets` that count

struct Product {
  AtenTensorHandle left, right, out;
  int64_t chunks;
};

Product shared;                    // written while no ticket is left, and read by those that hold one
std::atomic<uint32_t> tickets{0};  // chunks that nobody has taken yet, and above them the product's number
std::atomic<int64_t> done_by_helpers{0};
std::atomic<bool> failed{false};
std::atomic<int64_t> wanted{1};  // threads of the product, the calling one among them
std::atomic<int> ready{1};       // threads that there are
std::mutex in_use;
std::mutex starting;

void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#else
  std::this_thread::yield();
#endif
}

// Whether something came true before it was worth going to sleep.
template <class Condition>
bool soon(Condition condition) {
  const auto late = std::chrono::steady_clock::now() + kAwake;
  for (int i = 0; !condition(); ++i) {
    if (i % 64 == 63 && std::chrono::steady_clock::now() > late) return false;
    relax();
  }
  return true;
}

bool take(int64_t* chunk) {
  uint32_t now = tickets.load(std::memory_order_acquire);
  while (now & kCount) {
    if (tickets.compare_exchange_weak(now, now - 1, std::memory_order_acq_rel)) {
      *chunk = (now & kCount) - 1;
      return true;
    }
  }
  return false;
}

// Rows or columns of a matrix, without a copy.
AOTITorchError part(AtenTensorHandle whole, int dim, int64_t from, int64_t to, AtenTensorHandle* view) {
  int64_t *sizes, *strides;
  if (aoti_torch_get_sizes(whole, &sizes) || aoti_torch_get_strides(whole, &strides)) return AOTI_TORCH_FAILURE;
  int64_t shape[2] = {sizes[0], sizes[1]};
  shape[dim] = to - from;
  return aoti_torch__reinterpret_tensor(whole, 2, shape, strides, from * strides[dim], view);
}

bool compute(const Product& product, int64_t chunk) {
  int64_t* sizes;
  if (aoti_torch_get_sizes(product.out, &sizes)) return false;
  const int dim = sizes[1] >= sizes[0];  // the longer side is cut
  const int64_t from = sizes[dim] * chunk / product.chunks, to = sizes[dim] * (chunk + 1) / product.chunks;
  AtenTensorHandle in = nullptr, out = nullptr;
  const bool right =
      !part(dim ? product.right : product.left, dim, from, to, &in) && !part(product.out, dim, from, to, &out) &&
      !aoti_torch_cpu_mm_out(out, dim ? product.left : in, dim ? in : product.right);
  if (in) aoti_torch_delete_tensor_object(in);
  if (out) aoti_torch_delete_tensor_object(out);
  return right;
}

void help(int number) {
  at::set_num_threads(1);
  ++ready;
  for (int64_t chunk;;) {
    if (soon([&] { return number < wanted && take(&chunk); })) {
      if (!compute(shared, chunk)) failed = true;
      done_by_helpers.fetch_add(1, std::memory_order_release);
    } else if (const uint32_t now = tickets; !(now & kCount)) {
      tickets.wait(now);
    }
  }
}

}  // namespace

extern "C" {

// Have so many threads, the calling one among them, or as many as the system gives.
void deepprob_have_threads(int count) {
  std::lock_guard<std::mutex> alone(starting);
  int started = ready;
  try {
    for (; started < count; ++started) std::thread(help, started).detach();
  } catch (const std::system_error&) {
    // Those that there are do the work.
  }
  // Each leaves torch's number of threads at one when it starts: not later, when the caller has set another.
  while (ready < started) std::this_thread::yield();
}

AOTITorchError aoti_torch_cpu_shared_mm(
    AtenTensorHandle left, AtenTensorHandle right, int64_t threads, AtenTensorHandle* out) {
  int64_t *rows, *columns;
  int32_t dtype;
  if (aoti_torch_get_sizes(left, &rows) || aoti_torch_get_sizes(right, &columns) ||
      aoti_torch_get_dtype(left, &dtype)) {
    return AOTI_TORCH_FAILURE;
  }
  const int64_t work = rows[0] * rows[1] * columns[1];
  const int64_t shape[2] = {rows[0], columns[1]}, strides[2] = {columns[1], 1};
  if (aoti_torch_empty_strided(2, shape, strides, dtype, aoti_torch_device_type_cpu(), 0, out)) {
    return AOTI_TORCH_FAILURE;
  }
  // How a product is cut does not depend on who computes it, so that one seed gives one result.
  const int64_t most = std::min<int64_t>(std::max(shape[0], shape[1]), kCount);
  const int64_t chunks = std::min({work / kChunk, threads * (work < kLarge ? 1 : 2), most});
  bool right_so_far = true;
  std::unique_lock<std::mutex> mine(in_use, std::try_to_lock);
  if (chunks < 2) {
    right_so_far = !aoti_torch_cpu_mm_out(*out, left, right);
  } else if (!mine.owns_lock()) {  // another fit's product has the helpers
    for (int64_t i = 0; i < chunks; ++i) right_so_far &= compute({left, right, *out, chunks}, i);
  } else {
    shared = {left, right, *out, chunks};
    wanted = threads;
    done_by_helpers = 0;
    failed = false;
    tickets = ((tickets | kCount) + 1) | static_cast<uint32_t>(chunks);
    tickets.notify_all();
    int64_t own = 0;
    for (int64_t chunk; take(&chunk); ++own) right_so_far &= compute(shared, chunk);
    const auto complete = [&] { return done_by_helpers.load(std::memory_order_acquire) == chunks - own; };
    while (!soon(complete)) std::this_thread::yield();
    right_so_far &= !failed;
  }
  if (right_so_far) return AOTI_TORCH_SUCCESS;
  aoti_torch_delete_tensor_object(*out);
  return AOTI_TORCH_FAILURE;
}
}
