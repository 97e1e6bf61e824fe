// Kernels that Python calls with the addresses of tensors, which it holds: torch's dispatcher takes 0.01 ms for the
// arguments of a loss, and more where its code is not in the caches; the loss of 16,000 tokens takes less. Only for
// what the ops' callers have checked; every kernel is an op of torch too. One file of an op defines such a function, and
// module.cpp names it. All symbols are of Python's stable ABI.
#pragma once
#include <Python.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <exception>
#include <string>

namespace fastalign {

// The arguments, from left to right. A wrong type leaves Python's error set, which `finished` reports.
class Arguments {
 public:
  Arguments(PyObject* const* given, Py_ssize_t count) : at_(given), end_(given + count) {}

  int64_t integer() { return at_ < end_ ? PyLong_AsLongLong(*at_++) : missing(); }
  double number() { return at_ < end_ ? PyFloat_AsDouble(*at_++) : static_cast<double>(missing()); }
  // In the order of DTYPES in fastalign/ops/direct.py; undefined for an unknown one.
  torch::headeronly::ScalarType dtype() {
    using torch::headeronly::ScalarType;
    constexpr ScalarType known[] = {ScalarType::Float, ScalarType::BFloat16, ScalarType::Half,
                                    ScalarType::Bool,  ScalarType::Int,      ScalarType::Long};
    const int64_t code = integer();
    return code >= 0 && code < 6 ? known[code] : ScalarType::Undefined;
  }
  // Null for 0.
  template <typename T>
  T* address() {
    return reinterpret_cast<T*>(integer());
  }

  // Runs work() without the interpreter's lock; None, or null with Python's error set.
  template <typename Work>
  PyObject* finished(const Work& work) {
    if (PyErr_Occurred()) return nullptr;
    if (missing_ || at_ != end_) {
      PyErr_SetString(PyExc_TypeError, "fastalign._C: wrong number of arguments");
      return nullptr;
    }
    std::string error;
    PyThreadState* state = PyEval_SaveThread();
    try {
      work();
    } catch (const std::exception& thrown) {
      error = thrown.what();
    }
    PyEval_RestoreThread(state);
    if (!error.empty()) {
      PyErr_SetString(PyExc_RuntimeError, error.c_str());
      return nullptr;
    }
    Py_INCREF(Py_None);
    return Py_None;
  }

 private:
  int64_t missing() {
    missing_ = true;
    return 0;
  }

  PyObject* const* at_;
  PyObject* const* end_;
  bool missing_ = false;
};

using DirectCall = PyObject*(PyObject* module, PyObject* const* given, Py_ssize_t count);
DirectCall policy_loss_direct, preference_loss_direct, preference_loss_backward_direct, kl_estimate_direct,
    kl_estimate_backward_direct, bradley_terry_loss_direct;

}  // namespace fastalign
