// `import fastalign._C` loads this library, which registers the kernels of the other files; a few of them can be called
// with addresses too: direct.h.
#include "direct.h"

namespace {

PyMethodDef method(const char* name, fastalign::DirectCall* call) {
  return {name, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(call)), METH_FASTCALL, nullptr};
}

PyMethodDef methods[] = {
    method("bradley_terry_loss", fastalign::bradley_terry_loss_direct),
    method("kl_estimate", fastalign::kl_estimate_direct),
    method("kl_estimate_backward", fastalign::kl_estimate_backward_direct),
    method("policy_loss", fastalign::policy_loss_direct),
    method("preference_loss", fastalign::preference_loss_direct),
    method("preference_loss_backward", fastalign::preference_loss_backward_direct),
    {nullptr, nullptr, 0, nullptr},
};

}  // namespace

extern "C" PyObject* PyInit__C(void) {
  static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, methods};
  return PyModule_Create(&module);
}
