// Package layers checks that no file of package main uses a file of a higher layer, and
// that no mode uses another. layers.txt lists the layers.
package layers

import (
	"bytes"
	"cmp"
	"fmt"
	"go/ast"
	"go/importer"
	"go/parser"
	"go/token"
	"go/types"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// modes are the first files of the lines that are modes.
var modes = []string{"webhook", "gate", "sidecar", "setup", "status"}

func TestLayers(t *testing.T) {
	list, err := os.ReadFile("layers.txt")
	if err != nil {
		t.Fatal(err)
	}
	for _, problem := range check(t, "../..", string(list)) {
		t.Error(problem)
	}
}

// The check finds an upward use, a use between modes, and files that only the list or
// only the folder has.
func TestCheckFindsProblems(t *testing.T) {
	folder := t.TempDir()
	for name, text := range map[string]string{
		"go.mod":     "module example\n\ngo 1.26.0\n",
		"gate.go":    "package main\n\nfunc main() { new(thing).low(); run() }\n",
		"sidecar.go": "package main\n\nfunc run() {}\n",
		"low.go":     "package main\n\ntype thing struct{ high int }\n\nfunc (t *thing) low() { t.up() }\n",
		"high.go":    "package main\n\nfunc (t *thing) up() { t.high++ }\n",
		"new.go":     "package main\n",
	} {
		if err := os.WriteFile(filepath.Join(folder, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	want := []string{
		"gate.go uses run of sidecar.go",
		"layers.txt names gone.go, which is not there",
		"low.go uses up of high.go",
		"new.go is in no layer",
	}
	if got := check(t, folder, "gate\nsidecar\nhigh\nlow gone\n"); !slices.Equal(got, want) {
		t.Errorf("got %q, want %q", got, want)
	}
}

// check returns the forbidden uses in the package of a folder, and the files that the
// list lacks or has too many. They are sorted.
func check(t *testing.T, folder, list string) (problems []string) {
	t.Helper()
	layer, isMode := map[string]int{}, map[string]bool{}
	for n, line := range strings.Split(list, "\n") {
		files := strings.Fields(line)
		if len(files) == 0 || strings.HasPrefix(line, "#") {
			continue
		}
		for _, file := range files {
			layer[file], isMode[file] = n, slices.Contains(modes, files[0])
		}
	}

	set, files, uses, ours := load(t, folder)
	fileAt := func(at token.Pos) string { return strings.TrimSuffix(filepath.Base(set.Position(at).Filename), ".go") }
	there := map[string]bool{}
	for _, f := range files {
		name := fileAt(f.Pos())
		there[name] = true
		if _, ok := layer[name]; !ok {
			problems = append(problems, name+".go is in no layer")
		}
	}
	for name := range layer {
		if !there[name] {
			problems = append(problems, "layers.txt names "+name+".go, which is not there")
		}
	}
	for id, object := range uses {
		from, to := fileAt(id.Pos()), fileAt(object.Pos())
		if object.Pkg() != ours || !isShared(object) || from == to {
			continue
		}
		upward := layer[to] < layer[from]
		betweenModes := layer[to] != layer[from] && isMode[to] && isMode[from]
		if _, ok := layer[from]; ok && (upward || betweenModes) {
			problems = append(problems, fmt.Sprintf("%s.go uses %s of %s.go", from, object.Name(), to))
		}
	}
	slices.Sort(problems)
	return slices.Compact(problems)
}

// isShared reports whether other files can use an object: it is declared at package
// level, or is a method. A field follows its type.
func isShared(o types.Object) bool {
	if f, ok := o.(*types.Func); ok && f.Signature().Recv() != nil {
		return true
	}
	return o.Parent() == o.Pkg().Scope()
}

// load parses and type-checks the package in a folder, with the export data of its
// imports.
func load(t *testing.T, folder string) (*token.FileSet, []*ast.File, map[*ast.Ident]types.Object, *types.Package) {
	t.Helper()
	goList := func(args ...string) string {
		var stderr bytes.Buffer
		command := exec.Command("go", append([]string{"list"}, args...)...)
		command.Dir, command.Stderr = folder, &stderr
		out, err := command.Output()
		if err != nil {
			t.Fatalf("%v: %v\n%s", command.Args, err, stderr.String())
		}
		return string(out)
	}
	exports := map[string]string{}
	for line := range strings.Lines(goList("-export", "-deps", "-f", "{{.ImportPath}} {{.Export}}", ".")) {
		path, file, _ := strings.Cut(strings.TrimSpace(line), " ")
		exports[path] = file
	}
	set := token.NewFileSet()
	var files []*ast.File
	for _, name := range strings.Fields(goList("-f", `{{join .GoFiles " "}}`, ".")) {
		f, err := parser.ParseFile(set, filepath.Join(folder, name), nil, parser.SkipObjectResolution)
		if err != nil {
			t.Fatal(err)
		}
		files = append(files, f)
	}
	config := types.Config{Importer: importer.ForCompiler(set, "gc", func(path string) (io.ReadCloser, error) {
		return os.Open(cmp.Or(exports[path], path+": no export data"))
	})}
	info := &types.Info{Uses: map[*ast.Ident]types.Object{}}
	ours, err := config.Check("main", set, files, info)
	if err != nil {
		t.Fatal(err)
	}
	return set, files, info.Uses, ours
}
