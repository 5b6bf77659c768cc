# What C++ users get: the shared library, the public headers, a CMake package and a pkg-config file.
# All of it finds its parts from where it lies, so the folder may be moved; the wheel holds the same.
include(GNUInstallDirs)
include(CMakePackageConfigHelpers)

# The objects of the core, compiled once, with only what is marked DSFP4_API to be seen.
add_library(dsfp4 SHARED $<TARGET_OBJECTS:dsfp4_core>)
add_library(dsfp4::dsfp4 ALIAS dsfp4)
target_compile_features(dsfp4 PUBLIC cxx_std_20)
target_include_directories(dsfp4 PUBLIC $<BUILD_INTERFACE:${PROJECT_SOURCE_DIR}/include>
                                        $<INSTALL_INTERFACE:${CMAKE_INSTALL_INCLUDEDIR}>)
target_link_libraries(dsfp4 PRIVATE dsfp4_core)  # for the libraries that the core is linked with
# The map also hides what the standard library's templates leave behind.
set(DSFP4_MAP ${PROJECT_SOURCE_DIR}/cmake/dsfp4.map)
target_link_options(dsfp4 PRIVATE -Wl,--version-script=${DSFP4_MAP})
set_target_properties(dsfp4 PROPERTIES LINK_DEPENDS ${DSFP4_MAP})
# The number of the binary interface is in the SONAME: api.h says why.
file(STRINGS ${PROJECT_SOURCE_DIR}/include/dsfp4/api.h DSFP4_ABI REGEX "^#define DSFP4_ABI [0-9]+$")
string(REGEX MATCH "[0-9]+$" DSFP4_ABI "${DSFP4_ABI}")
if(NOT DSFP4_ABI)
  message(FATAL_ERROR "include/dsfp4/api.h does not define DSFP4_ABI as a number")
endif()
if(DSFP4_BUILD_PYTHON)  # a wheel holds no symbolic links, so the one file has the whole name
  set_target_properties(dsfp4 PROPERTIES SUFFIX ${CMAKE_SHARED_LIBRARY_SUFFIX}.${DSFP4_ABI})
else()
  set_target_properties(dsfp4 PROPERTIES VERSION ${DSFP4_ABI} SOVERSION ${DSFP4_ABI})
endif()

set(DSFP4_CMAKE_DIR ${CMAKE_INSTALL_LIBDIR}/cmake/dsfp4)
install(TARGETS dsfp4 EXPORT dsfp4Targets COMPONENT cpp
  LIBRARY DESTINATION ${CMAKE_INSTALL_LIBDIR} COMPONENT cpp NAMELINK_COMPONENT cpp)
if(TARGET dsfp4_cuda)  # beside the library; the Python extension looks there too
  install(TARGETS dsfp4_cuda LIBRARY DESTINATION ${CMAKE_INSTALL_LIBDIR} COMPONENT python)
endif()
install(DIRECTORY ${PROJECT_SOURCE_DIR}/include/dsfp4 DESTINATION ${CMAKE_INSTALL_INCLUDEDIR}
  COMPONENT cpp)
install(EXPORT dsfp4Targets NAMESPACE dsfp4:: DESTINATION ${DSFP4_CMAKE_DIR} COMPONENT cpp)

configure_package_config_file(cmake/dsfp4Config.cmake.in ${PROJECT_BINARY_DIR}/dsfp4Config.cmake
  INSTALL_DESTINATION ${DSFP4_CMAKE_DIR} NO_SET_AND_CHECK_MACRO)
write_basic_package_version_file(${PROJECT_BINARY_DIR}/dsfp4ConfigVersion.cmake
  COMPATIBILITY SameMinorVersion)
install(FILES ${PROJECT_BINARY_DIR}/dsfp4Config.cmake ${PROJECT_BINARY_DIR}/dsfp4ConfigVersion.cmake
  DESTINATION ${DSFP4_CMAKE_DIR} COMPONENT cpp)

set(DSFP4_PKGCONFIG_DIR ${CMAKE_INSTALL_LIBDIR}/pkgconfig)
file(RELATIVE_PATH DSFP4_PREFIX_FROM_PC /prefix/${DSFP4_PKGCONFIG_DIR} /prefix)
string(REGEX REPLACE "/$" "" DSFP4_PREFIX_FROM_PC "${DSFP4_PREFIX_FROM_PC}")
configure_file(cmake/dsfp4.pc.in ${PROJECT_BINARY_DIR}/dsfp4.pc @ONLY)
install(FILES ${PROJECT_BINARY_DIR}/dsfp4.pc DESTINATION ${DSFP4_PKGCONFIG_DIR} COMPONENT cpp)
