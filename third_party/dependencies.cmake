# Finds what dsfp4 builds on; nothing is vendored. ./dev installs all of it on Debian and Ubuntu.
find_package(Threads REQUIRED)
find_package(nlohmann_json 3.10 REQUIRED)  # Debian: nlohmann-json3-dev; headers only, not shipped
find_path(XXHASH_INCLUDE_DIR xxhash.h REQUIRED)  # Debian: libxxhash-dev; its header alone is used

# Debian: liburing-dev. Static, so that a wheel needs nothing of it at run time.
find_path(LIBURING_INCLUDE_DIR liburing.h REQUIRED)
find_library(LIBURING_LIBRARY liburing.a REQUIRED)
add_library(liburing::static UNKNOWN IMPORTED)
set_target_properties(liburing::static PROPERTIES IMPORTED_LOCATION "${LIBURING_LIBRARY}"
                      INTERFACE_INCLUDE_DIRECTORIES "${LIBURING_INCLUDE_DIR}")

if(DSFP4_BUILD_PYTHON)
  find_package(Python 3.10 REQUIRED COMPONENTS Interpreter Development.Module
               OPTIONAL_COMPONENTS Development.SABIModule)
  execute_process(COMMAND "${Python_EXECUTABLE}" -m nanobind --cmake_dir
                  OUTPUT_STRIP_TRAILING_WHITESPACE OUTPUT_VARIABLE nanobind_ROOT
                  COMMAND_ERROR_IS_FATAL ANY)
  find_package(nanobind CONFIG REQUIRED)  # PyPI: nanobind
endif()

if(DSFP4_BUILD_TESTS)
  find_package(GTest REQUIRED)  # Debian: libgtest-dev
endif()

include(cmake/cuda.cmake)  # the CUDA toolkit, where there is use for it
if(DSFP4_CUDA_FOUND)
  set(CMAKE_CUDA_ARCHITECTURES ${DSFP4_CUDA_TARGETS})
  enable_language(CUDA)
endif()
