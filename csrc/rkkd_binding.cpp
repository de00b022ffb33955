#include "rkkd.h"

#include <tuple>

#include "bindings.h"

namespace luce {
namespace {

std::tuple<Tensor, Tensor> rkkd(const Tensor& student, const Tensor& teacher, const std::optional<Tensor>& weight,
                                int64_t form, double steepness, bool needs_gradient) {
  RkkdArguments arguments{};
  arguments.student = floating_rows(student, "student");
  arguments.teacher = floating_rows(teacher, "teacher");
  check_same_shape(arguments.student, arguments.teacher, "teacher");
  const Rows& rows = arguments.student;
  const Type wide = wide_type(rows, arguments.teacher);
  arguments.weight = per_row(weight, rows, wide, "weight");
  STD_TORCH_CHECK(form >= 0 && form <= static_cast<int64_t>(RkkdForm::clip), "expected `form` from 0 to 3");
  STD_TORCH_CHECK(steepness > 0, "expected `steepness` above 0");
  Tensor loss = empty(row_shape(student, rows), wide);
  Tensor gradient = needs_gradient ? empty_like(student, rows) : empty({0}, wide);
  if (needs_gradient) arguments.gradient = rows_of(gradient, "gradient");
  arguments.loss = loss.data_ptr();
  arguments.wide = wide == Type::float64;
  arguments.form = static_cast<RkkdForm>(form);
  arguments.steepness = steepness;
  run(LUCE_CHOOSE(rkkd), arguments, rows, rows.classes * rows.classes);
  return {loss, gradient};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(luce, CPU, m) { m.impl("rkkd", TORCH_BOX(&rkkd)); }

}  // namespace luce
