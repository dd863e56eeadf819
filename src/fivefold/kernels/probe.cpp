// Whether C++ with OpenMP can be compiled and called here.
#include <omp.h>

extern "C" int threads() { return omp_get_max_threads(); }
