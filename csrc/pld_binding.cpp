#include <tuple>

#include "bindings.h"
#include "pld.h"

namespace luce {
namespace {

// Option: the types of the fields of PldOptions. Braces refuse one that does not fit its field.
template <class... Option>
std::tuple<Tensor, Tensor, Tensor> pld(const Tensor& student, const Tensor& teacher, const std::optional<Tensor>& target,
                                       const std::optional<Tensor>& weight, const std::optional<Tensor>& order,
                                       Option... option, bool needs_gradient) {
  PldArguments arguments{};
  arguments.student = floating_rows(student, "student");
  arguments.teacher = floating_rows(teacher, "teacher");
  check_same_shape(arguments.student, arguments.teacher, "teacher");
  const Rows& rows = arguments.student;
  const Type wide = wide_type(rows, arguments.teacher);
  arguments.target = static_cast<const int64_t*>(per_row(target, rows, Type::int64, "target"));
  arguments.weight = per_row(weight, rows, wide, "weight");
  if (order) {
    arguments.order = rows_of(*order, "order");
    check_same_shape(rows, arguments.order, "order");
    STD_TORCH_CHECK(arguments.order.type == Type::int64 || arguments.order.type == Type::int32,
                    "expected `order` of int64 or int32");
  }
  Tensor loss = empty(row_shape(student, rows), wide);
  Tensor bound = empty({rows.count(), 2}, wide);
  Tensor gradient = needs_gradient ? empty_like(student, rows) : empty({0}, wide);
  arguments.wide = wide == Type::float64;
  arguments.loss = loss.data_ptr();
  arguments.bound = bound.data_ptr();
  if (needs_gradient) arguments.gradient = rows_of(gradient, "gradient");
  arguments.options = {option...};
  STD_TORCH_CHECK(arguments.options.top_k >= 1, "expected `top_k` of at least 1, got ", arguments.options.top_k);
  std::atomic<bool> bad_order{false};
  arguments.bad_order = &bad_order;
  run(LUCE_CHOOSE(pld), arguments, rows);
  STD_TORCH_CHECK(!bad_order, "expected each row of the given order to hold every class once");
  return {loss, bound, gradient};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(luce, CPU, m) { m.impl("pld", TORCH_BOX((&pld<double, int64_t, double, double, bool>))); }

}  // namespace luce
