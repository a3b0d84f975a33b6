// Says how launches would look on a GPU that need not be there: the kernels' own functions decide, on the host.
//
//   gpu_plans MULTIPROCESSORS THREADS_PER_BLOCK SHARED_BYTES CACHE_BYTES
//
// reads a request a line, and prints a JSON object a line:
//
//   stoch_norm (float32|bfloat16) (forward|backward) (plain|fused) OUTER CHANNELS INNER
//   squared_distance (float32|bfloat16) (sources|none) ELEMENTS...
//
// gpu_launches.py compiles it with the header of tests/simt that stands in for CUDA's.
#include "cuda/squared_distance.cuh"
#include "cuda/stoch_norm.cuh"

#include <cstdio>
#include <cstdlib>
#include <iostream>
#include <sstream>
#include <string>
#include <vector>

namespace {

using namespace talib_fast;

const char* name_of(float) { return "float"; }
const char* name_of(__nv_bfloat16) { return "bfloat16"; }
template <typename T, bool kFused>
std::string name_of(const stoch_norm::Forward<T, kFused>&) {
  return std::string("Forward<") + name_of(T{}) + (kFused ? ", true>" : ", false>");
}
template <typename T, bool kFused>
std::string name_of(const stoch_norm::Backward<T, kFused>&) {
  return std::string("Backward<") + name_of(T{}) + (kFused ? ", true>" : ", false>");
}

// Of the sliced schedule: its list of items, as [first pass, group, slice].
std::string order_of(const stoch_norm::Plan& plan) {
  const stoch_norm::Geometry& g = plan.geometry;
  const unsigned items = plan.resident ? 0 : 2 * g.groups * g.slices;
  std::string text;
  for (unsigned ticket = 0; ticket < items; ++ticket) {
    const stoch_norm::Item item(ticket, g, plan.lag);
    text += (text.empty() ? "[" : ", [") + std::to_string(item.first_pass) + ", " + std::to_string(item.group) + ", " +
            std::to_string(item.slice) + "]";
  }
  return text;
}

template <typename Op>
void print_stoch_norm(const stoch_norm::Shape& shape, const Device& device) {
  const Op op{};  // null is aligned to everything
  stoch_norm::with_vectors(op, shape, device, [&](auto vector, auto rows) {
    const stoch_norm::Plan plan = stoch_norm::choose_plan<Op, vector(), rows()>(shape, device);
    const stoch_norm::Geometry& g = plan.geometry;
    const char* by_rows = rows() ? "true" : "false";
    std::printf(
        R"({"kernel": "%s_kernel<%s, %d, %s>", "resident": %s, "threads": %d, "blocks": %d, "shared_bytes": %zu, )"
        R"("vector": %d, "rows": %s, "run": %lld, "columns": %d, "lane_rows": %d, "log_lanes": %d, )"
        R"("group_channels": %d, "groups": %u, "steps": %lld, "slices": %u, "slice_steps": %lld, "sections": %u, )"
        R"("section_slices": %u, "lag": %u, "whole_words": %s, "order": [%s]})"
        "\n",
        plan.resident ? "resident" : "sliced", name_of(op).c_str(), vector(), by_rows, plan.resident ? "true" : "false",
        plan.threads, plan.blocks, plan.shared_bytes, vector(), by_rows, static_cast<long long>(g.run), g.columns,
        g.lane_rows, g.log_lanes, g.group_channels, g.groups, static_cast<long long>(g.steps), g.slices,
        static_cast<long long>(g.slice_steps), g.sections, g.section_slices, plan.lag, g.whole_words ? "true" : "false",
        order_of(plan).c_str());
  });
}

template <typename T>
bool print_stoch_norm(bool forward, bool fused, const stoch_norm::Shape& shape, const Device& device) {
  if (forward && fused) print_stoch_norm<stoch_norm::Forward<T, true>>(shape, device);
  else if (forward) print_stoch_norm<stoch_norm::Forward<T, false>>(shape, device);
  else if (fused) print_stoch_norm<stoch_norm::Backward<T, true>>(shape, device);
  else print_stoch_norm<stoch_norm::Backward<T, false>>(shape, device);
  return true;
}

bool stoch_norm_request(std::istream& request, const Device& device) {
  std::string type, direction, kind;
  stoch_norm::Shape shape{};
  if (!(request >> type >> direction >> kind >> shape.outer >> shape.channels >> shape.inner)) return false;
  const bool forward = direction == "forward", fused = kind == "fused";
  if (type == "float32") return print_stoch_norm<float>(forward, fused, shape, device);
  if (type == "bfloat16") return print_stoch_norm<__nv_bfloat16>(forward, fused, shape, device);
  return false;
}

bool squared_distance_request(std::istream& request, const Device& device) {
  std::string type, sources;
  if (!(request >> type >> sources) || (type != "float32" && type != "bfloat16")) return false;
  if (sources != "sources" && sources != "none") return false;
  // as make_operand has it: bytes of an element, and twice as many with a source's
  const int bytes_log2 = (type == "float32" ? 2 : 1) + (sources == "sources");
  std::vector<squared_distance::Operand> operands;
  for (int64_t elements; request >> elements;) {
    operands.emplace_back().elements = elements;
    operands.back().bytes_log2 = static_cast<uint8_t>(bytes_log2);
  }
  const std::vector<squared_distance::Launch> launches = squared_distance::plan(operands, device.multiprocessors);
  std::printf(R"({"launches": [)");
  for (const squared_distance::Launch& launch : launches) {
    const bool few = launch.count <= squared_distance::kFewOperands;
    std::printf(R"(%s{"operands": %d, "blocks": %u, "threads": %d, "chunk": %lld, "operand_blocks": [)",
                &launch == &launches.front() ? "" : ", ",
                few ? squared_distance::kFewOperands : squared_distance::kManyOperands, launch.blocks,
                squared_distance::kThreads, static_cast<long long>(launch.chunk_bytes >> bytes_log2));
    for (int j = 0; j < launch.count; ++j) {
      const unsigned last = j + 1 < launch.count ? launch.operands[j + 1].first_block : launch.blocks;
      std::printf("%s%u", j ? ", " : "", last - launch.operands[j].first_block);
    }
    std::printf("]}");
  }
  std::printf("]}\n");
  return true;
}

}  // namespace

int main(int count, char** arguments) {
  if (count != 5) {
    std::fprintf(stderr, "expected 4 arguments, got %d\n", count - 1);
    return 2;
  }
  const Device device{std::atoi(arguments[1]), std::atoi(arguments[2]), std::atoi(arguments[3]),
                      std::atoi(arguments[4])};
  for (std::string line; std::getline(std::cin, line);) {
    std::istringstream request(line);
    std::string operation;
    request >> operation;
    const bool understood = operation == "stoch_norm"         ? stoch_norm_request(request, device)
                            : operation == "squared_distance" ? squared_distance_request(request, device)
                                                              : false;
    if (!understood) {
      std::fprintf(stderr, "no request: %s\n", line.c_str());
      return 2;
    }
  }
}
