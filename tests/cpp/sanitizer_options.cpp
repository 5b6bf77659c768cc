// An allocation that cannot succeed is an error to handle, under the sanitizers too, which would
// otherwise end the process.
#define SANITIZER_HOOK extern "C" __attribute__((visibility("default"))) const char*

SANITIZER_HOOK __asan_default_options();  // the names are the sanitizers'
SANITIZER_HOOK __tsan_default_options();

SANITIZER_HOOK __asan_default_options() { return "allocator_may_return_null=1"; }
SANITIZER_HOOK __tsan_default_options() { return "allocator_may_return_null=1"; }
