#include <tuple>

#include "bindings.h"
#include "divergence.h"

namespace luce {
namespace {

using Result = std::tuple<Tensor, Tensor>;

// What the operators have in common: checks, outputs, and the run.
template <class Kernel, class Arguments>
Result run_on(Kernel kernel, Arguments& arguments, const Tensor& student, const std::optional<Tensor>& teacher,
              const std::optional<Tensor>& weight, bool needs_gradient) {
  arguments.student = floating_rows(student, "student");
  const Rows& rows = arguments.student;
  if (teacher) {
    arguments.teacher = floating_rows(*teacher, "teacher");
    check_same_shape(rows, arguments.teacher, "teacher");
  }
  const Type wide = wide_type(rows, teacher ? arguments.teacher : rows);
  arguments.wide = wide == Type::float64;
  arguments.weight = per_row(weight, rows, wide, "weight");
  Tensor loss = empty(row_shape(student, rows), wide);
  Tensor gradient = needs_gradient ? empty_like(student, rows) : empty({0}, wide);
  arguments.loss = loss.data_ptr();
  if (needs_gradient) arguments.gradient = rows_of(gradient, "gradient");
  run(kernel, arguments, rows);
  return {loss, gradient};
}

const int64_t* labels(const Tensor& target, const Tensor& student) {
  return static_cast<const int64_t*>(per_row(target, rows_of(student, "student"), Type::int64, "target"));
}

Result divergence(const Tensor& student, const Tensor& teacher, const std::optional<Tensor>& weight, int64_t kind,
                  double temperature, double share, bool needs_gradient) {
  STD_TORCH_CHECK(kind >= 0 && kind <= static_cast<int64_t>(Divergence::limit), "expected `kind` from 0 to 3, got ", kind);
  DivergenceArguments arguments{};
  arguments.kind = static_cast<Divergence>(kind);
  arguments.temperature = temperature;
  arguments.share = share;
  return run_on(LUCE_CHOOSE(divergence), arguments, student, teacher, weight, needs_gradient);
}

Result dkd(const Tensor& student, const Tensor& teacher, const Tensor& target, const std::optional<Tensor>& weight,
           double temperature, double alpha, double beta, bool needs_gradient) {
  DkdArguments arguments{};
  arguments.target = labels(target, student);
  arguments.temperature = temperature;
  arguments.alpha = alpha;
  arguments.beta = beta;
  return run_on(LUCE_CHOOSE(dkd), arguments, student, teacher, weight, needs_gradient);
}

Result cross_entropy(const Tensor& student, const Tensor& target, const std::optional<Tensor>& weight,
                     double label_smoothing, bool needs_gradient) {
  CrossEntropyArguments arguments{};
  arguments.target = labels(target, student);
  arguments.smoothing = label_smoothing;
  return run_on(LUCE_CHOOSE(cross_entropy), arguments, student, std::nullopt, weight, needs_gradient);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(luce, CPU, m) {
  m.impl("divergence", TORCH_BOX(&divergence));
  m.impl("dkd", TORCH_BOX(&dkd));
  m.impl("cross_entropy", TORCH_BOX(&cross_entropy));
}

}  // namespace luce
