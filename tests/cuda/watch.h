// What ThreadSanitizer is told of the machine: which CUDA thread is at work, and what orders two of
// them. It then judges the kernels as if all threads of all blocks ran at once. Without it nothing of
// this is there.
#pragma once

#if defined(__SANITIZE_THREAD__)
#define WDK_WATCHED
#elif defined(__has_feature)
#if __has_feature(thread_sanitizer)
#define WDK_WATCHED
#endif
#endif

#ifdef WDK_WATCHED

#include <sanitizer/tsan_interface.h>

// The machine itself: its threads take turns, which orders nothing on a device.
#define WDK_UNWATCHED __attribute__((no_sanitize("thread")))

namespace emulated::watch {

WDK_UNWATCHED inline void* create() { return __tsan_create_fiber(0); }
WDK_UNWATCHED inline void* current() { return __tsan_get_current_fiber(); }
WDK_UNWATCHED inline void enter(void* thread) {
  __tsan_switch_to_fiber(thread, __tsan_switch_to_fiber_no_sync);
}

// What comes before a release is seen by what comes behind an acquire of the same place.
WDK_UNWATCHED inline void release(void* place) { __tsan_release(place); }
WDK_UNWATCHED inline void acquire(void* place) { __tsan_acquire(place); }

}  // namespace emulated::watch

#else

#define WDK_UNWATCHED

namespace emulated::watch {

inline void* create() { return nullptr; }
inline void* current() { return nullptr; }
inline void enter(void*) {}
inline void release(void*) {}
inline void acquire(void*) {}

}  // namespace emulated::watch

#endif
