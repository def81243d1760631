// Lets go of the threads of parallel regions before a fork.
//
// GNU OpenMP keeps the threads of a region for the next one. A forked process inherits the record of them but not the
// threads, and its first region, torch's or ours, would wait for them for ever. Without a record a region starts
// threads anew, in either process.
#include <omp.h>
#include <pthread.h>

namespace quantkern::cpu {
namespace {

// Of the thread that forks: it is the only one that the new process has. Inside a region this does nothing.
void release_threads() { omp_pause_resource_all(omp_pause_soft); }

[[maybe_unused]] const int registered = pthread_atfork(release_threads, nullptr, nullptr);

}  // namespace
}  // namespace quantkern::cpu
